"""Benchmarks of a model whose heads several devices share: a process each, started by torchrun."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

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


def end(failed: bool) -> NoReturn:
    """Ends a rank's process at once: gloo's threads may abort one that is torn down around them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failed))


def least(value: float, device: torch.device) -> float:
    """The least that a rank says, so that all decide alike."""
    told = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MIN)
    return float(told)


def split(make: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Each rank's part of a model of random weights, those of the first layer in every layer.

    Ranks draw the same ones, so that no checkpoint is written and none read.
    """
    first = copy.deepcopy(config)
    state: dict[str, torch.Tensor] = {}
    first.num_hidden_layers = 1
    torch.manual_seed(0)
    for name, weight in made(make, first, dtype, device).state_dict().items():
        layers = range(config.num_hidden_layers if ".layers.0." in name else 1)
        state |= dict.fromkeys((name.replace(".0.", f".{n}.", 1) for n in layers), weight.cpu())
    found = make.from_pretrained(None, config=config, state_dict=state, tp_plan="auto", dtype=dtype)
    torch.manual_seed(0)  # from here on all draw the same prompts and gates
    return found.eval()


def made(make: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of random weights, made directly on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make(config).eval()
    finally:
        torch.set_default_dtype(before)
