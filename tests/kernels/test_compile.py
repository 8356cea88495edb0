"""Every kernel compiles for every supported device, within its shared memory, without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(configuration: str, cache: Path) -> None:
    # The interpreter's flag is read when triton is imported, so this needs a process of its own.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache)
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kernels.compile_kernels", configuration],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = {line.split()[1] for line in done.stdout.splitlines()}
    assert {
        "_append",
        "_attend",
        "_chunks",
        "_column_sums",
        "_count_digits",
        "_decode_write",
        "_fold",
        "_mark",
        "_mark_whole",
        "_move_kept",
        "_read_tokens",
        "_row_sums",
        "_split",
        "_store",
        "_top_pages",
    } <= compiled


@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100])
def test_compiles(cc: int, tmp_path: Path) -> None:
    run(f"{cc}:128:{64 if cc == 90 else 16}:bfloat16", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("cc", [80, 86, 89, 90, 100])
def test_compiles_elsewhere(cc: int, dim: int, dtype: str, tmp_path: Path) -> None:
    run(f"{cc}:{dim}:16:{dtype}", tmp_path)
