"""Times of calls, by device events; a call rotates over buffers that the L2 cannot hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch

ROTATE = 256 << 20  # bytes that the buffer sets of a timed call cover together
FLUSH = 1 << 30
Call = Callable[[], Any]


def sets_for(bytes_of_one: int) -> int:
    """Buffer sets to rotate over so that no call finds its data in the L2."""
    return max(1, -(-ROTATE // max(bytes_of_one, 1)))


def median_ms(
    calls: Sequence[Call], device: torch.device, before: Call | None = None, budget: float = 600.0
) -> float:
    """Median milliseconds of one call after a warm-up; `before` runs untimed before each.

    `budget` is about how many milliseconds to spend. Without a GPU every call runs once.
    """
    if device.type != "cuda":
        return statistics.median(_one_clock(call, before) for call in calls)
    # Written before each call: empties the L2, and keeps the device busy while the host launches.
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    for call in calls:
        _one_event(call, before, flush)
    once = _one_event(calls[0], before, flush)
    repeats = min(max(int(budget / once), 3 if once > 100 else 10), 100)
    return statistics.median(
        _one_event(call, before, flush) for call in islice(cycle(calls), repeats)
    )


def _one_event(call: Call, before: Call | None, flush: torch.Tensor) -> float:
    if before is not None:
        before()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _one_clock(call: Call, before: Call | None) -> float:
    if before is not None:
        before()
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def captured_ms(calls: Sequence[Call], device: torch.device) -> float:
    """Median milliseconds of one call inside a CUDA graph that holds all of them, in turn."""
    if device.type != "cuda":
        return median_ms(calls, device)
    for call in calls:
        call()
    rounds = max(1, 16 // len(calls))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return median_ms([graph.replay], device) / (rounds * len(calls))


def ceilings(device: torch.device, quick: bool) -> tuple[float, float]:
    """Measured copy rate (bytes/s, read and written) and bf16 matrix rate (FLOP/s)."""
    size = 1 << (12 if quick else 31)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    copy = 2 * size / (1e-3 * median_ms([lambda: target.copy_(source)], device))
    n = 64 if quick else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = 2 * n**3 / (1e-3 * median_ms([lambda: a @ b], device))
    return copy, product
