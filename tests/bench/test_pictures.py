"""The committed pictures are those that one command draws from the committed results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[2] / "docs/measurements"


def test_committed_pictures_are_those_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    titles = {}
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, path, **options: titles.update({path: figure.get_suptitle().strip()}),
    )
    module.main(["--out", str(tmp_path)])
    drawn = {path.relative_to(tmp_path) for path in titles}
    assert drawn == {path.relative_to(FOLDER) for path in FOLDER.rglob("*.png")}
    assert all(titles.values()) and len(set(titles.values())) == len(titles)
