"""HeadKV: heads hold as much as they are worth."""

from __future__ import annotations

from typing import Any

import attrs

from .._fields import number, shown
from .._names import named
from ._base import BudgetView, Counts
from ._wrapper import Wrapper


def _rows(value: Any) -> Any:
    """Lists as tuples; anything else is left to the validator."""
    if isinstance(value, list | tuple) and all(isinstance(row, list | tuple) for row in value):
        return tuple(tuple(row) for row in value)
    return value


def _worths(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    wanted = "importance: wanted numbers from 0 as [layer][head], some above 0"
    if not isinstance(value, tuple) or not all(isinstance(row, tuple) for row in value):
        raise TypeError(f"{wanted}, got {shown(value)}")
    flat = [x for row in value for x in row]
    if any(not isinstance(x, int | float) or isinstance(x, bool) for x in flat):
        raise TypeError(f"{wanted}, got {shown(value)}")
    if len({len(row) for row in value}) != 1 or not all(0 <= x < 1e300 for x in flat):
        raise ValueError(f"{wanted}, got {shown(value)}")
    if not any(flat):
        raise ValueError(f"{wanted}, got {shown(value)}")


@named
@attrs.frozen
class HeadKV(Wrapper):
    """HeadKV: a part of all heads' tokens is dealt by their `importance` `[L][Hkv]`.

    Fu et al., 2024 (FYYFU/HeadKV, snapkv_utils.py). Of n global tokens a head, n // `beta` go to a
    pool of all heads that it binds (those of layers that slide hold none); a head keeps the others
    and its part of the pool, p = s^t / sum s^t with its importance s and `temperature` t. HeadKV
    measures query heads by what they retrieve: combine those of a KV head, such as by their mean.
    """

    importance: tuple[tuple[float, ...], ...] = attrs.field(
        kw_only=True, converter=_rows, validator=_worths
    )
    beta: float = attrs.field(
        default=1.5, kw_only=True, validator=number("a number of at least 1", lambda x: x >= 1)
    )
    temperature: float = attrs.field(
        default=1.0, kw_only=True, validator=number("a number of at least 0", lambda x: x >= 0)
    )

    @property
    def shares_heads(self) -> bool:
        return True

    @property
    def spans_layers(self) -> bool:
        return True

    def check_model(self, layers: int, kv_heads: int) -> None:
        found = [len(self.importance), len(self.importance[0])]
        if found != [layers, kv_heads]:
            raise ValueError(
                f"importance: wanted [layers][kv_heads] = [{layers}][{kv_heads}] of the model, got "
                f"[{found[0]}][{found[1]}]"
            )

    def targets(self, view: BudgetView) -> Counts:
        powers = [[x**self.temperature for x in row] for row in self.importance]
        bound = [powers[layer] for layer in view.layers]
        worth = sum(map(len, bound)) / (sum(map(sum, bound)) or 1)

        def dealt(mean: int, power: float) -> int:
            pool = int(mean // self.beta)
            return round(power * worth * pool + mean - pool)

        return [
            [
                [dealt(mean, power) for mean, power in zip(means, own, strict=True)]
                for means, own in zip(row, bound, strict=True)
            ]
            for row in self.base.targets(view)
        ]
