"""LU-KV: heads hold parts that were found for a model beforehand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs

from .._fields import check_number, shown
from .._names import named
from ._base import Budget, BudgetView, Counts

_STEPS = 99  # of a file: 1 % to 99 % pruned


def _rows(value: Any) -> Any:
    """Lists as tuples; anything else is left to the validator."""
    if isinstance(value, list | tuple) and all(isinstance(row, list | tuple) for row in value):
        return tuple(tuple(row) for row in value)
    return value


def _parts(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    wanted = f"parts: wanted numbers from 0 to 1 as [layer][head], got {shown(value)}"
    if not isinstance(value, tuple) or not all(isinstance(row, tuple) for row in value):
        raise TypeError(wanted)
    flat = [x for row in value for x in row]
    if any(not isinstance(x, int | float) or isinstance(x, bool) for x in flat):
        raise TypeError(wanted)
    if not flat or len({len(row) for row in value}) != 1 or not all(0 <= x <= 1 for x in flat):
        raise ValueError(wanted)


@named
@attrs.frozen
class LUKV(Budget):
    """Each head keeps its own of `parts` `[L][Hkv]` of the tokens seen, window included.

    Tang et al., 2026, arXiv 2602.08585, in the form of NVIDIA/kvpress (lukv_press.py): a layer's
    heads keep as many tokens together as their parts are rounded to, those whose parts have the
    largest fractions one more, and each at least one. The parts are a model's and a scorer's: the
    authors' for Llama-3.1-8B go with `ExpectedAttention(epsilon=0.02)`.

    Example:
        `ExpectedAttention(budget=LUKV.from_curve("ratios.npy", 0.2), epsilon=0.02)`
    """

    parts: tuple[tuple[float, ...], ...] = attrs.field(converter=_rows, validator=_parts)

    @classmethod
    def from_curve(cls, path: str | os.PathLike[str], keep: float) -> LUKV:
        """The parts by which a model keeps `keep` of its tokens, from a file of baidu-baige/LU-KV.

        Args:
            path: a `.npy` file of floats `[99, L, Hkv]`: what each head loses where 1 % to 99 %
                of all tokens go.
            keep: what is kept on average, above 0 and below 1; to whole percents, as there.

        Raises:
            ValueError: the file is damaged or holds something else.
        """
        import numpy as np

        check_number("keep", keep, "a number above 0 and below 1", lambda x: 0 < x < 1)
        wanted = f"{Path(path)}: wanted floats [{_STEPS}, L, Hkv] from 0 to 1"
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{wanted}, got no .npy file: {error}") from error
        if not isinstance(found, np.ndarray) or found.dtype.kind != "f":
            raise ValueError(f"{wanted}, got {getattr(found, 'dtype', type(found).__name__)}")
        if found.ndim != 3 or len(found) != _STEPS or not found.size:
            raise ValueError(f"{wanted}, got {list(found.shape)}")
        lost = found[min(max(round((1 - keep) * 100), 1), _STEPS) - 1].astype(float)
        if not ((lost >= 0) & (lost <= 1)).all():
            raise ValueError(f"{wanted}, got {lost.min()} to {lost.max()}")
        return cls((1 - lost).tolist())

    @property
    def shares_heads(self) -> bool:
        return True

    @property
    def pools_heads(self) -> bool:
        return False

    def check_model(self, layers: int, kv_heads: int) -> None:
        found = [len(self.parts), len(self.parts[0])]
        if found != [layers, kv_heads]:
            raise ValueError(
                f"parts: wanted [layers][kv_heads] = [{layers}][{kv_heads}] of the model, got "
                f"[{found[0]}][{found[1]}]"
            )

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return sum(self._tokens(seen, layer)) // len(self.parts[layer])

    def targets(self, view: BudgetView) -> Counts:
        return [
            [[max(n - view.window, 0) for n in self._tokens(seen, layer)] for layer in view.layers]
            for seen in view.seen
        ]

    def _tokens(self, seen: int, layer: int) -> list[int]:
        """Tokens of each head of a layer after `seen`."""
        ideal = [part * seen for part in self.parts[layer]]
        found = [int(x) for x in ideal]
        by_fraction = sorted(range(len(ideal)), key=lambda head: found[head] - ideal[head])
        for head in by_fraction[: max(round(sum(ideal)) - sum(found), 0)]:
            found[head] += 1
        return [max(n, min(seen, 1)) for n in found]
