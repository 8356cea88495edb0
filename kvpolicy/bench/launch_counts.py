"""Counting launches: on a device by the profiler, elsewhere what a device would be given."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

REGION = "kvpolicy counts"
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


class Launches(TorchDispatchMode):
    """Names of Triton kernels, and of torch operations that a device would run as kernels."""

    # Allocations; fill_ is how the test session poisons them.
    FREE = frozenset(
        {
            *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
            *("fill_", "_unsafe_view", "detach", "lift_fresh", "alias"),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def interpreted_launches(operations: bool = False) -> Iterator[list[str]]:
    """Names of the Triton kernels launched inside, where the interpreter runs them.

    With `operations` torch's as well; what the interpreter does to run a kernel does not count.
    """
    from triton.runtime.interpreter import GridExecutor

    found, original = Launches(), GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.names.append(self.fn.__name__)
        with _disable_current_modes():
            return original(self, *args, **kwargs)

    GridExecutor.__call__ = counted
    try:
        with found if operations else contextlib.nullcontext():
            yield found.names
    finally:
        GridExecutor.__call__ = original


@contextlib.contextmanager
def profiled() -> Iterator[Counter[str]]:
    """Counts, filled on exit.

    On the device kernels, copies and reads (copies to the host); on the host syncs and graphs.
    """
    counts: Counter[str] = Counter()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with (
        torch.profiler.profile(activities=kinds, acc_events=True) as profile,
        torch.profiler.record_function(REGION),
    ):
        yield counts
    events = profile.events()
    cuda = torch.autograd.DeviceType.CUDA
    region = next(e.time_range for e in events if e.name == REGION and e.device_type != cuda)
    for event in events:
        name = event.name
        if event.device_type == cuda:
            if name.startswith("Memcpy DtoH"):
                counts["reads"] += 1
            elif name.startswith(("Memcpy", "Memset")):
                counts["copies"] += 1
            elif name != REGION:
                counts["kernels"] += 1
        elif region.start <= event.time_range.start <= region.end:
            counts["syncs"] += name in SYNCS
            counts["graphs"] += name == "cudaGraphLaunch"
