"""XAttention: blocks by the mass on their antidiagonals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import check_int, fraction, positive
from .._names import named
from ..ops import Ops, TileReads
from ._base import PromptSelection
from ._prompt import PromptCall, PromptView, Reads

WHOLE = 1 << 30  # the mass of a tile, as the integers that blocks are compared by count it


def tile_field(default: int) -> Any:
    """Positions in a tile: a power of two."""
    return attrs.field(default=default, validator=_power)


def _power(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    check_int(attribute.alias, value, 1, 1 << 16)
    if value & (value - 1):
        raise ValueError(f"{attribute.alias}: wanted a power of two, got {value}")


@named
@attrs.frozen(kw_only=True)
class XAttention(PromptSelection):
    """Block-sparse prefilling by antidiagonal sums (mit-han-lab/x-attention, Xattention.py).

    Queries and keys are taken in groups of `stride`. The logit of two groups is the mean of q.k on
    their antidiagonal, its softmax over the groups of keys up to the query's the weight of one on
    another; a block's mass is the sum of these in a tile. Each query head reads the first block,
    its tile's own and the heaviest others, until they hold the fraction `threshold` of the mass;
    ties go to the lower block. Where tokens are absent the mean is over those that are there, and a
    group weighs as much as it holds. With every token present this is the original's choice, apart
    from a last, partly filled group of keys, and from its first `chunk_size` queries: there it does
    not make sure of the first block, and reads one more of the others. A `threshold` of 1 reads
    everything. Paper: arXiv 2503.16428, with strides of 8 and 16.

    Example:
        `CachePipeline(selection=XAttention(threshold=0.9))`
    """

    threshold: float = attrs.field(default=0.9, validator=fraction())
    stride: int = attrs.field(default=8, validator=positive)
    tile: int = tile_field(128)

    def __attrs_post_init__(self) -> None:
        if self.tile % self.stride:
            raise ValueError(
                f"stride, tile: wanted a stride that divides the tile, got {self.stride} and "
                f"{self.tile}"
            )

    def choose(self, ops: Ops, call: PromptCall) -> TileReads:
        keys, present = call.keys_at(ops, self.tile)
        blocks = ops.antidiagonal_blocks(
            call.query, keys, present, call.segments, call.scale, self.tile, self.stride,
            self.threshold, softcap=call.softcap,
        )  # fmt: skip
        return TileReads(self.tile, blocks)

    def prompt(self, view: PromptView) -> Reads:
        end = view.tiles(self.tile).stop
        kept = (_heaviest(mass, self.threshold) for mass in self.masses(view))
        return Reads(torch.stack([F.pad(x, (0, end - x.shape[1])) for x in kept], 1))

    def masses(self, view: PromptView) -> Iterator[Tensor]:
        """The mass `[Hq, n + 1]` of each block that tile n sees, for the tiles one by one."""
        tiles, tile, stride = view.tiles(self.tile), self.tile, self.stride
        kv_heads, end, dim = view.keys.shape
        dtype = torch.promote_types(view.keys.dtype, torch.float32)
        after = tiles.stop * tile - end
        query = F.pad(view.query.to(dtype), (0, 0, view.start - tiles.start * tile, after))
        asks = torch.arange(tiles.start * tile, tiles.stop * tile, device=query.device)
        asks = ((asks >= view.start) & (asks < end)).view(-1, tile // stride, stride).any(-1)
        query = query.view(kv_heads, -1, len(tiles), tile // stride, stride, dim).flip(4)
        keys = F.pad(view.keys.to(dtype), (0, 0, 0, after)).view(kv_heads, -1, stride * dim)
        held = F.pad(view.present, (0, after)).view(kv_heads, -1, stride).sum(-1).to(dtype)
        group = torch.arange(keys.shape[1], device=keys.device)
        for place, number in enumerate(tiles):
            q = query[:, :, place].flatten(3).flatten(1, 2)  # [Hkv, G * R, S * D]
            upto = (number + 1) * tile // stride
            n = held[:, None, :upto]
            logits = q @ keys[:, :upto].mT * (view.scale / n.clamp(min=1))
            if view.softcap is not None:
                logits = view.softcap * (logits / view.softcap).tanh()
            own = group[number * tile // stride : upto].repeat(q.shape[1] // (tile // stride))
            seen = (group[:upto] <= own[:, None]) & (n > 0)
            logits = (logits + (n / stride).log()).masked_fill(~seen, float("-inf"))
            weights = logits.softmax(-1).masked_fill(~seen, 0)
            rows = weights.view(view.query.shape[0], tile // stride, number + 1, -1).sum(-1)
            yield rows[:, asks[place]].mean(1)


def _heaviest(mass: Tensor, threshold: float) -> Tensor:
    """The first, the last and the heaviest of `[H, M]` blocks that hold a part of their mass."""
    if threshold >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    amount = (mass * WHOLE).round().long()
    needed = amount.sum(-1, keepdim=True).double() * threshold
    sure = torch.zeros_like(amount, dtype=torch.bool)
    sure[:, 0] = sure[:, -1] = True
    others, order = amount.masked_fill(sure, -1).sort(dim=-1, descending=True, stable=True)
    others = others.clamp(min=0)
    before = amount.masked_fill(~sure, 0).sum(-1, keepdim=True) + others.cumsum(-1) - others
    return sure.scatter(-1, order, before < needed) | sure
