"""Kernels compiled without a device, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def compiled(configuration: str, cache: Path, *options: str) -> list[tuple[str, dict[str, int]]]:
    """Names of kernels, and what compile_kernels says of each launch."""
    # The interpreter's flag is read when triton is imported; a device that is there is not asked.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.support.kernels.compile_kernels", configuration]
    done = subprocess.run([*command, *options], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = (line.split() for line in done.stdout.splitlines())
    return [(name, {k: int(n) for k, n in (x.split("=") for x in rest)}) for name, *rest in rows]
