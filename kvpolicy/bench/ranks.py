"""Benchmarks of a model whose heads several devices share: a process each, started by torchrun."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def started() -> int:
    """How many processes torchrun started, of which this is one; 0 without it."""
    return int(os.environ.get("WORLD_SIZE", 0)) if "RANK" in os.environ else 0


def check_devices(ranks: int, quick: bool) -> None:
    """Raises ValueError where there are fewer GPUs than ranks."""
    here = torch.cuda.device_count()
    if here < ranks and not quick:
        raise ValueError(f"tp: wanted at most the {here} CUDA devices that there are, got {ranks}")


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Runs `kvpolicy bench` with these arguments in `ranks` processes; the exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", str(ranks), "-m", "kvpolicy.cli", "bench"]
    # Captured steps and exchanges between them follow each other, so NCCL need not keep them apart.
    env = {"NCCL_GRAPH_MIXING_SUPPORT": "0", "OMP_NUM_THREADS": "1"} | os.environ
    return subprocess.run([*command, *arguments], env=env).returncode


@contextlib.contextmanager
def together() -> Iterator[int]:
    """This process's rank, in a group of all while it is open."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.device_count() >= ranks
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield rank
    finally:
        with contextlib.suppress(Exception):  # a rank that broke off has left it
            dist.destroy_process_group()


def least(value: float, device: torch.device) -> float:
    """The least that a rank says, so that all decide alike."""
    told = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return float(told)


def split(model: Any, dtype: torch.dtype) -> Any:
    """Each rank's part of a model that rank 0 made; the others give None."""
    from transformers import AutoModelForCausalLM

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    try:
        if model is not None:
            model.save_pretrained(folder[0])
        dist.barrier()
        found = AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=dtype)
        torch.manual_seed(0)  # from here on all draw the same prompts and gates
        return found.eval()
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            for path in Path(folder[0]).iterdir():
                path.unlink()
            Path(folder[0]).rmdir()
