"""Draws the pictures of this folder anew from the results in it.

    python docs/measurements/draw.py            # into this folder
    python docs/measurements/draw.py --out DIR  # elsewhere

What was measured stays as it is: only pictures are written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvpolicy.bench.curves import draw_curves
from kvpolicy.bench.plots import read_rows
from kvpolicy.evaluation.grid.plots import plots
from kvpolicy.evaluation.grid.records import from_json

HERE = Path(__file__).resolve().parent
# The last was measured again, and counts.
MODEL = ("llama-100k-200k", "llama-300k-500k", "llama-32k", "qwen3-4b", "llama-again")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the pictures")
    out = parser.parse_args(arguments).out
    (out / "learning").mkdir(parents=True, exist_ok=True)
    draw_curves(out, *read_rows([HERE / f"h200-{name}.json" for name in MODEL]))
    cells = json.loads((HERE / "learning/results.json").read_text(encoding="utf-8"))["cells"]
    plots(out / "learning", [from_json(cell) for cell in cells])


if __name__ == "__main__":
    main()
