"""How Inductor compares the kernels that it could take."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator


@contextlib.contextmanager
def cold_timing() -> Iterator[None]:
    """Lets Inductor time candidates with a cold L2, by `triton.testing.do_bench`, while it is open.

    A decode step reads every weight once, from memory. Inductor's own benchmarker writes a buffer
    as large as the L2 between two launches; most of a matrix may survive that, and kernels are
    chosen that are fast on what is cached. For Qwen3-4B's gate and up projection (100 MB) on an
    H200 it took one of 44 us where do_bench, which writes 256 MB, found one of 28. torch has no
    option for it that works after its import.
    """
    try:
        from torch._inductor.runtime import benchmarking

        own = benchmarking.benchmarker
        cold = functools.partial(benchmarking.TritonBenchmarker.benchmark_gpu, own)
        default = type(own) is benchmarking.InductorBenchmarker
        replaced = default and "benchmark_gpu" not in vars(own)
    except (ImportError, AttributeError):  # internals of torch, which may move
        replaced = False
    if not replaced:
        yield
        return
    vars(own)["benchmark_gpu"] = cold
    try:
        yield
    finally:
        del vars(own)["benchmark_gpu"]
