"""FlexPrefill: a pattern and a budget for each head, from a prompt's last queries."""

from __future__ import annotations

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import fraction, optional, positive
from .._names import named
from ._base import PromptSelection
from ._last_queries import along_diagonals, best, by_distance, last_weights
from ._prompt import PromptView, Reads
from .xattention import tile_field

_TOKENS = 128  # by which the original divides a number of tokens, whatever its blocks


@named
@attrs.frozen(kw_only=True)
class FlexPrefill(PromptSelection):
    """Blocks of a prompt by query head (bytedance/FlexPrefill, ops/flex_prefill_attention.py).

    The attention of the last `tile` queries is summed over blocks of tokens and of distances back
    from a query. As many of the heaviest blocks of either kind are read as the tokens (distances)
    that cover the fraction `gamma` of the mass fill, `min_budget` to `max_budget` tokens, the first
    block and the nearest among them. A head whose blocks of tokens are told apart as well by the
    mean of these queries and the mean of each block's keys (the root of their Jensen-Shannon
    divergence is below `tau`) reads the least number of these, and the pairs of a tile and a block
    whose means weigh most, until they cover `gamma` of the mass of all tiles. Prompts of at most
    two tiles or `min_budget` tokens are dense. Means are over the tokens that are there. It decides
    whole prompts (`whole_prompt`): early logits depend on later tokens. Paper: arXiv 2502.20766.

    Example:
        `CachePipeline(selection=FlexPrefill(gamma=0.9, tau=0.1))`
    """

    gamma: float = attrs.field(default=0.9, validator=fraction(low_open=True))
    tau: float = attrs.field(default=0.1, validator=fraction())
    min_budget: int = attrs.field(default=512, validator=positive)
    max_budget: int | None = attrs.field(default=None, validator=optional(positive))
    tile: int = tile_field(128)

    def __attrs_post_init__(self) -> None:
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise ValueError(
                "min_budget, max_budget: wanted a least that is not above the most, got "
                f"{self.min_budget} and {self.max_budget}"
            )

    @property
    def whole_prompt(self) -> bool:
        return True

    def prompt(self, view: PromptView) -> Reads:
        tile, tiles, end = self.tile, view.tiles(self.tile), view.keys.shape[1]
        heads, kv_heads = view.query.shape[0], view.keys.shape[0]
        blocks, each = tiles.stop, heads // kv_heads
        least = -(-self.min_budget // tile)
        most = blocks if self.max_budget is None else min(-(-self.max_budget // tile), blocks)
        if end <= max(2, least) * tile:
            every = torch.ones(heads, len(tiles), blocks, dtype=torch.bool, device=view.keys.device)
            return Reads(every)
        found = []
        for head in range(kv_heads):
            weights = last_weights(view, tile, head)
            tokens, back = weights.mean(-2), along_diagonals(weights) / weights.shape[-2]
            number = [self._cover(x, least, most) for x in (tokens, back)]
            tokens, back = (_blocks(x, blocks, tile) for x in (tokens, back))
            queries, keys = _means(view, head, tile)
            last = view.query[head * each : (head + 1) * each, -tile:].to(keys.dtype).mean(1)
            told = _softmax(last @ keys.T * view.scale, keys)
            alike = _distance(told, tokens) < self.tau
            number = [n.masked_fill(alike, least) for n in number]
            tokens[:, 0] = back[:, -1] = float("inf")
            columns = best(tokens, number[0])[:, None]
            own = columns | by_distance(best(back, number[1]).flip(-1), tiles)
            pairs = _softmax(self._causal(queries @ keys.T * view.scale, tiles), keys)
            covered = self._covered(pairs.flatten(1)).view_as(pairs)
            found.append(own | (covered & alike[:, None, None]))
        return Reads(torch.cat(found))

    def _cover(self, x: Tensor, least: int, most: int) -> Tensor:
        """Blocks that what covers `gamma` of rows `[G, N]` fills, `[G]`."""
        covered = x.sort(dim=-1, descending=True).values.cumsum(-1) <= self.gamma
        return ((covered.sum(-1) + 1) // _TOKENS + 1).clamp(min=least).clamp(max=max(most, least))

    def _covered(self, x: Tensor) -> Tensor:
        """The heaviest of `[G, N]` that hold at most `gamma` of the mass of each."""
        values, order = x.sort(dim=-1, descending=True, stable=True)
        within = values.cumsum(-1) <= self.gamma * x.sum(-1, keepdim=True)
        return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, within)

    @staticmethod
    def _causal(logits: Tensor, tiles: range) -> Tensor:
        block = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill(block > block[tiles.start :, None], float("-inf"))


def _blocks(x: Tensor, blocks: int, tile: int) -> Tensor:
    """Sums `[G, M]` over successive entries of `[G, N]`."""
    padded = F.pad(x, (0, blocks * tile - x.shape[-1]))
    return padded.view(*x.shape[:-1], blocks, tile).sum(-1)


def _means(view: PromptView, head: int, tile: int) -> tuple[Tensor, Tensor]:
    """Mean queries `[G, N, D]` of tiles, and mean keys `[M, D]` of blocks, NaN where none is."""
    tiles, each = view.tiles(tile), view.query.shape[0] // view.keys.shape[0]
    dtype = torch.promote_types(view.keys.dtype, torch.float32)
    before, end = view.start - tiles.start * tile, view.keys.shape[1]
    pad = (0, 0, before, tiles.stop * tile - end)
    query = F.pad(view.query[head * each : (head + 1) * each].to(dtype), pad)
    there = F.pad(query.new_ones(view.query.shape[1]), pad[2:]).view(-1, tile).sum(-1)
    query = query.unflatten(1, (len(tiles), tile)).sum(2) / there[:, None]
    keys = F.pad(view.keys[head].to(dtype), (0, 0, 0, pad[3])).unflatten(0, (-1, tile)).sum(1)
    held = F.pad(view.present[head], (0, pad[3])).view(-1, tile).sum(-1)
    return query, keys / held[:, None]


def _softmax(logits: Tensor, keys: Tensor) -> Tensor:
    """Weights of blocks `[..., M]`; 0 where a block has no token."""
    empty = keys.isnan().any(-1)
    return logits.masked_fill(empty, float("-inf")).softmax(-1).nan_to_num(0)


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """The root of the Jensen-Shannon divergence of rows `[G, M]`; what is 0 in one adds nothing."""
    middle = (p + q) / 2
    parts = [torch.where(x > 0, x * (x / middle).log(), 0).sum(-1) for x in (p, q)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0).sqrt()
