"""The first call of a process, with empty and with full caches of compiled kernels on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import BackendError
from .context import Bench, Case
from .model import SHAPES, Setting, build, pipeline_of, wait
from .rows import Goal, Row

WANTED = {"eager layers": 3.0, "compiled layers": 8.0, "a new batch size": 3.0}  # s, from disk
COLD = 40.0  # s of a process's calls in all, with nothing on disk
LENGTHS = (2000, 1200, 400, 1800)  # tokens of the batch that comes second
PATIENCE = 300.0
_LAST = "first call: "  # begins the line that a process prints


def rows(bench: Bench) -> Iterator[Row]:
    """Seconds of a process's first `generate` and of its first ragged batch."""
    with tempfile.TemporaryDirectory() as folder:
        both = ("eager layers", "compiled layers")
        for layers in bench.pick(both, both[:1]):  # tiny shapes are not compiled
            own = os.path.join(folder, layers.split()[0])
            for disk in ("nothing on disk", "from disk"):
                found = child(layers, own, bench.quick, min(bench.left(), PATIENCE))
                yield from _rows(layers, disk, found)


def _rows(layers: str, disk: str, found: dict[str, float]) -> Iterator[Row]:
    for what in ("first call", "a new batch size", "second call"):
        goals = list[Goal]()
        wanted = WANTED[layers] if what == "first call" else WANTED.get(what)
        if disk == "from disk" and wanted is not None:
            goals = [Goal(what="s", wanted=wanted, got=found[what])]
        elif disk != "from disk" and what == "a new batch size":
            both = found["first call"] + found[what]
            goals = [Goal(what="s with the first call", wanted=COLD, got=both)]
        yield Row(
            group="first-call", name=f"{what}, {layers}, {disk}", value=found[what], unit="s",
            goals=tuple(goals),
        )  # fmt: skip


def child(layers: str, folder: str, quick: bool, patience: float) -> dict[str, float]:
    """What a new process says of its calls, with its caches on disk in `folder`.

    Raises:
        BackendError: it ended without an answer.
    """
    env = os.environ | {
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor"),
    }
    asked = [sys.executable, "-m", __name__, layers, "quick" if quick else "whole"]
    done = subprocess.run(asked, env=env, capture_output=True, text=True, timeout=patience)
    for line in done.stdout.splitlines():
        if line.startswith(_LAST):
            told: dict[str, float] = json.loads(line.removeprefix(_LAST))
            return told
    said = (done.stderr.strip().splitlines() or [""])[-1]
    raise BackendError(f"first call: a process ended with exit code {done.returncode}: {said}")


def calls(bench: Bench, compiled: bool) -> dict[str, float]:
    """Seconds of the first calls of this process; the model is made before."""
    from ..adapters.hf import attach

    model: Any = build(bench, SHAPES[0])
    lengths = bench.pick(LENGTHS, (20, 9))
    wide = torch.zeros(len(lengths), max(lengths), dtype=torch.long, device=bench.device)
    mask = torch.zeros_like(wide)
    for row, length in enumerate(lengths):
        wide[row, -length:] = torch.randint(1, model.config.vocab_size, (length,))
        mask[row, -length:] = 1
    pipeline = pipeline_of(bench, Setting(policy="gate", tokens=max(lengths) + 64))
    found = {}
    with attach(model, pipeline, compile=compiled) as _:
        for what, rows_of in (("first call", 1), ("second call", 1), ("a new batch size", None)):
            wait(bench)
            start = time.perf_counter()
            model.generate(
                wide[:rows_of], attention_mask=mask[:rows_of], do_sample=False,
                max_new_tokens=bench.pick(16, 3),
            ).tolist()  # fmt: skip
            found[what] = time.perf_counter() - start
    return found


def main(layers: str, size: str) -> None:
    """Measures in this process, and prints a line that `child` reads."""
    quick = size == "quick"
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    compiled = layers == "compiled layers" and not quick
    print(_LAST + json.dumps(calls(Bench(quick, PATIENCE), compiled)), flush=True)


def cases(bench: Bench) -> list[Case]:
    """One: four processes, of which each second reads what the one before it wrote."""
    return [Case(group="first-call", name="first calls", run=rows, seconds=200, rank=59)]


if __name__ == "__main__":
    main(*sys.argv[1:])
