"""Benchmarks by the names that people know them by."""

from __future__ import annotations

from pathlib import Path

from .benchmark import Benchmark
from .helmet import Helmet
from .niah import Niah
from .own import Own
from .published import PUBLISHED
from .ruler import Ruler

BENCHMARKS: dict[str, Benchmark] = {
    "ruler": Ruler(),
    "niah": Niah(),
    **PUBLISHED,
    "helmet": Helmet(),
}


def benchmark_of(name: str) -> Benchmark:
    """A benchmark by its name, or a user's file of questions.

    Raises:
        ValueError: neither.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise ValueError(f"benchmark: there is no file {name}")
        return Own(Path(name))
    raise ValueError(
        f"benchmark: wanted one of {', '.join(BENCHMARKS)} or a .jsonl file, got {name!r}"
    )
