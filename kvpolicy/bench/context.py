"""What every benchmark of a run shares: device, time limit, ceilings, results of others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import attrs
import torch

from .ranks import least
from .rows import CheckFailed, Row
from .timing import ceilings

T = TypeVar("T")
LIMIT = 1e-2  # relative error (Frobenius) of bfloat16 results against float64


class Bench:
    """One run of the benchmark."""

    def __init__(self, quick: bool, seconds: float, rank: int = 0, ranks: int = 1) -> None:
        self.quick = quick
        self.rank, self.ranks = rank, ranks  # of processes that share the model's heads
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16
        self.shared: dict[Any, Any] = {}  # what later benchmarks compare with
        self.copy_rate = self.flop_rate = float("nan")

    def measure_ceilings(self) -> list[Row]:
        """Sets `copy_rate` and `flop_rate`."""
        self.copy_rate, self.flop_rate = ceilings(self.device, self.quick)
        rates = {
            "device copy": (self.copy_rate, "TB/s"),
            "bf16 product": (self.flop_rate, "TFLOP/s"),
        }
        return [
            Row(group="ceilings", name=name, unit="", rate=rate / 1e12, rate_unit=unit)
            for name, (rate, unit) in rates.items()
        ]

    def pick(self, full: T, tiny: T) -> T:
        """A size: `full`, or `tiny` in a quick run."""
        return tiny if self.quick else full

    def left(self) -> float:
        """Seconds until the limit, the same on all ranks."""
        left = self.deadline - time.monotonic()
        return left if self.ranks == 1 else least(left, self.device)

    def say(self, text: str) -> None:
        """Prints progress."""
        if self.rank:
            return
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def floor_ms(self, flops: float = 0.0, moved: float = 0.0) -> float:
        """The larger of two times: operations at the matrix rate, bytes at the copy rate."""
        return 1e3 * max(flops / self.flop_rate, moved / self.copy_rate)

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal numbers in the run's dtype."""
        return torch.randn(*shape, dtype=self.dtype, device=self.device)


def check(name: str, got: torch.Tensor, exact: torch.Tensor, limit: float = LIMIT) -> None:
    """Raises CheckFailed unless the relative error of `got` against `exact` is below `limit`."""
    error = float((got.double() - exact.double()).norm() / exact.double().norm())
    if not error < limit:
        raise CheckFailed(f"{name}: relative error {error:.2e}, wanted < {limit:.0e}; not timed")


@attrs.frozen(kw_only=True)
class Case:
    """A benchmark: its name and function, roughly its seconds, and its place (low runs first)."""

    group: str
    name: str
    run: Callable[[Bench], Iterable[Row]]
    seconds: float = 10.0
    rank: int = 50
