"""The notebooks run offline on the packaged model, and are stored without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))
names = [path.stem for path in NOTEBOOKS]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def sources(path: Path, kind: str) -> list[str]:
    return ["".join(x["source"]) for x in read(path)["cells"] if x["cell_type"] == kind]


def test_there_are_four() -> None:
    assert [name[:2] for name in names] == ["1_", "2_", "3_", "4_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    found = read(path)
    assert found["nbformat"] == 4 and found["nbformat_minor"] >= 5
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for cell in found["cells"]:
        common = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            common |= {"outputs", "execution_count"}
        assert set(cell) == common and cell["metadata"] == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_a_notebook_opens_with_what_one_learns(path: Path) -> None:
    opening, first = sources(path, "markdown")[0], sources(path, "code")[0]
    assert opening.startswith("# ") and "**You will learn**" in opening
    assert first.startswith("# On Colab") and '!pip install "kvpolicy' in first.splitlines()[1]
    for text in sources(path, "code"):
        compile(text, path.name, "exec")
    said = "\n".join(sources(path, "markdown"))
    for other in re.findall(r"`(\d_\w+)`", said):
        assert other in names


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_a_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code cells in order in one namespace, which is what a kernel does with them."""
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found: dict[str, Any] = {"__name__": "__main__"}
    for number, text in enumerate(sources(path, "code"), 1):
        exec(compile(text, f"{path.name}, cell {number}", "exec"), found)
