"""Which kernels a process compiles, or loads from Triton's cache on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton import knobs


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that become ready to run inside, one for each variant.

    Those of other libraries too, whatever Triton's `jit` compiles. None where the interpreter runs.
    """
    found: list[str] = []
    before = knobs.runtime.jit_post_compile_hook

    def compiled(**told: Any) -> Any:
        found.append(str(told["fn"].name).rpartition(".")[2])
        return None if before is None else before(**told)

    knobs.runtime.jit_post_compile_hook = compiled
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


def disk_cache() -> str:
    """The folder where Triton keeps what it compiled.

    Inductor names one of its own in the environment when it first compiles, and Triton follows.
    """
    return str(knobs.cache.dir)
