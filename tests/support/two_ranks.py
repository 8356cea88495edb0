"""Two processes of gloo on a CPU: how a test starts them, and how they begin and end."""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = str(Path(__file__).resolve().parents[2])


def run_two(module: str, folder: Path, waits_for: Sequence[int] = (0, 1), **env: str) -> None:
    """Runs `module FOLDER RANK` as two ranks until those named have ended, which must end well."""
    ranks = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "PYTHONPATH": ROOT}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, "-m", module, str(folder), rank]
        ranks.append(
            subprocess.Popen(command, env=os.environ | own | env, stderr=subprocess.PIPE, text=True)
        )
    try:
        for rank in waits_for:
            _, said = ranks[rank].communicate(timeout=400)
            assert ranks[rank].returncode == 0, said
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def met(path: str | Path, rank: int, patience: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """A group of both ranks, which meet in a file; where it is left well, so is the process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=patience
    )
    yield
    dist.barrier()
    end_at_once()


def end_at_once() -> None:
    """Ends this process, with all that it should say said, before the interpreter is torn down.

    While anything, as a model's mesh, still holds the group then, gloo's threads run, and one that
    lets go of a tensor aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":  # a program, which runs as it stands
    runpy.run_path(sys.argv[1], run_name="__main__")
    end_at_once()
