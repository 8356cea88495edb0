"""RoPE as a policy knows it: by how much pairs of channels turn from a position to the next."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from ._fields import check_int, flag, number, shown
from ._names import named
from .ops import Pairs


def _each(instance: Rope, attribute: attrs.Attribute[Any], value: Any) -> None:
    wanted = f"frequencies: wanted a float for each pair, got {shown(value)}"
    if not isinstance(value, tuple):
        raise TypeError(wanted)
    if not value or not all(isinstance(x, float) for x in value):
        raise ValueError(wanted)


def _direction(instance: Rope, attribute: attrs.Attribute[Any], value: Any) -> None:
    check_int("sign", value, -1, 1)
    if not value:
        raise ValueError("sign: wanted 1 or -1, got 0")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@named
@attrs.frozen(kw_only=True)
class Rope:
    """The rotation of queries and keys by their position.

    Pair f of the channels turns by `frequencies[f]` radians a position, the other way with `sign`
    -1, and cos and sin are multiplied by `factor` (as YaRN does). Pairs are channels
    `(f, f + pairs)`, or `(2f, 2f + 1)` if `interleaved`, of the first `2 * pairs` channels of a
    head, or of the last ones with `tail`; other channels do not turn.
    """

    frequencies: tuple[float, ...] = attrs.field(converter=_tuple, validator=_each)
    interleaved: bool = attrs.field(default=False, validator=flag)
    tail: bool = attrs.field(default=False, validator=flag)
    sign: int = attrs.field(default=1, validator=_direction)
    factor: float = attrs.field(default=1.0, validator=number("a number above 0", lambda x: x > 0))

    def angles(self, positions: Tensor) -> Tensor:
        """Radians `[..., pairs]` float64 at `positions` `[...]`."""
        each = torch.tensor(self.frequencies, dtype=torch.float64, device=positions.device)
        return positions[..., None].double() * (each * self.sign)

    def mean(self, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin `[..., pairs]` float64, their mean over `count` positions from `first`.

        `first` `[...]`. Scaled by `factor`.
        """
        turned = self.angles(first[..., None] + torch.arange(count, device=first.device))
        return turned.cos().mean(-2) * self.factor, turned.sin().mean(-2) * self.factor

    def mean_matrix(self, first: Tensor, count: int, dim: int) -> Tensor:
        """`M` `[..., dim, dim]` float64: `x @ M` is `x` `[..., dim]` turned by `mean`."""
        cos, sin = (part[..., None, :] for part in self.mean(first, count))
        each = torch.eye(dim, dtype=cos.dtype, device=cos.device)
        return self.turned(each.expand(*first.shape, dim, dim), cos, sin)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """First and second channels of the pairs of `x` `[..., D]`, and those that do not turn."""
        turning, half = 2 * len(self.frequencies), len(self.frequencies)
        start = x.shape[-1] - turning if self.tail else 0
        part = x.narrow(-1, start, turning)
        rest = x.narrow(-1, 0 if self.tail else turning, x.shape[-1] - turning)
        if self.interleaved:
            first, second = part.unflatten(-1, (half, 2)).unbind(-1)
        else:
            first, second = part.split(half, -1)
        return first, second, rest

    def layout(self, dim: int) -> Pairs:
        """Where the pairs are among `dim` channels."""
        half = len(self.frequencies)
        start = dim - 2 * half if self.tail else 0
        return Pairs(start, 2, 1) if self.interleaved else Pairs(start, 1, half)

    def joined(self, first: Tensor, second: Tensor, rest: Tensor) -> Tensor:
        """`[..., D]` of what `pairs` took apart: `[..., pairs]` twice, and the rest."""
        if self.interleaved:
            out = torch.stack((first, second), -1).flatten(-2)
        else:
            out = torch.cat((first, second), -1)
        return torch.cat((rest, out) if self.tail else (out, rest), -1)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` `[..., D]` turned by `cos` and `sin` `[..., pairs]`, which are broadcast."""
        first, second, rest = self.pairs(x)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        return self.joined(first * cos - second * sin, second * cos + first * sin, rest)
