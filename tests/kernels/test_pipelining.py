"""What a compiled kernel must contain to be fast, and would lose without a wrong result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from tests.support.kernels import compile_kernels as tool
import torch
import triton

kept = []
compile = triton.compile
triton.compile = lambda *a, **k: kept.append(compile(*a, **k)) or kept[-1]
triton.runtime.jit.JITFunction.run = tool.record
cc, page = map(int, sys.argv[1:])
tool._launch.capability = lambda device: cc
tool.call_all(128, page, torch.bfloat16)
for kernel, bound, options in tool.launches:
    if kernel.__name__ in ("_split", "_reduce", "_quest_scores", "_top_pages"):
        tool.compile_launch(kernel, bound, options, cc)
        ptx = kept[-1].asm["ptx"]
        copies = ptx.count("cp.async.cg.shared.global")
        print(kernel.__name__, copies, ptx.count("cp.async.wait_group \\t2"),
              ptx.count("griddepcontrol.wait"), ptx.count("griddepcontrol.launch_dependents"))
"""


def compiled(cc: int, page: int, cache: Path) -> list[list[str]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(cc), str(page)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("cc", "page"), [(80, 16), (90, 64)])
def test_decode(cc: int, page: int, tmp_path: Path) -> None:
    found = compiled(cc, page, tmp_path)
    names = [name for name, *_ in found]
    assert names == ["_split", "_reduce"] * 2 + ["_quest_scores", "_top_pages"] * 2
    overlaps = cc >= 90
    for name, copies, in_flight, waits, triggers in found:
        first = name in ("_split", "_quest_scores")
        # Only the second kernel of a pair is launched early, so only that may and must wait.
        assert int(waits) == (overlaps and not first)
        assert int(triggers) == (overlaps and first)
        if name == "_split":
            # Keys and values of two blocks before each of the two loops and of one inside, 16
            # bytes a copy, while those of the last block are still on their way.
            assert int(copies) == 2 * 3 * 2 * (64 * 128 * 2) // (128 * 16)
            assert int(in_flight) == 2
