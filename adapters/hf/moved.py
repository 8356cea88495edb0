"""Positions that images moved: models keep those of their last call, caches those of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

NAME = "rope_deltas"  # of the module that counts positions


def counting(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that keep them for steps and turns to come."""
    return [module for module in model.modules() if NAME in vars(module)]


def moved_by(modules: Sequence[nn.Module]) -> list[Any] | None:
    """What they keep now; None where nothing does."""
    return [getattr(module, NAME) for module in modules] or None


def give(modules: Sequence[nn.Module], moved: list[Any] | None) -> None:
    """Lets the modules go on from `moved`, unless that is not known."""
    for module, value in zip(modules, moved or (), strict=False):
        setattr(module, NAME, value)


def of_rows(moved: list[Any] | None, rows: Sequence[int], batch: int) -> list[Any] | None:
    """Those of `rows` among `batch` sequences; -1 is a new one, which nothing moved."""
    return None if moved is None else [_of_rows(value, rows, batch) for value in moved]


def _of_rows(value: Any, rows: Sequence[int], batch: int) -> Any:
    if not isinstance(value, Tensor) or len(value) != batch:
        return value
    picked = value[[max(row, 0) for row in rows]]
    for place, row in enumerate(rows):
        if row < 0:
            picked[place] = 0
    return picked
