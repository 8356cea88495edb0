"""MInference's vertical-slash: columns and diagonals that a prompt's last queries weigh most."""

from __future__ import annotations

from typing import cast

import attrs
import torch
from torch import Tensor

from .._fields import not_negative, positive
from .._names import named
from ._base import PromptSelection
from ._last_queries import along_diagonals, best, by_distance, last_weights
from ._prompt import PromptView, Reads
from .xattention import tile_field


@named
@attrs.frozen(kw_only=True)
class VerticalSlash(PromptSelection):
    """Columns and diagonals by query head (microsoft/MInference, modules/minference_forward.py).

    The attention of the last `queries` is summed over them for each token and for each distance
    back from a query; every query then reads the `vertical` heaviest tokens, the `first` ones among
    them, and the tokens at the `slash` heaviest distances, the `nearest` among these. A diagonal is
    read in the whole blocks of `tile` tokens that it touches, which start at multiples of `tile`;
    the original reads ranges around it that start anywhere. It decides whole prompts
    (`whole_prompt`): what early queries read depends on later tokens, so early logits do. Paper:
    arXiv 2407.02490, with 1000 and 6096 for heads without a pattern of their own.

    Example:
        `CachePipeline(selection=VerticalSlash(vertical=1000, slash=6096))`
    """

    vertical: int = attrs.field(default=1000, validator=positive)
    slash: int = attrs.field(default=6096, validator=not_negative)
    queries: int = attrs.field(default=64, validator=positive)
    first: int = attrs.field(default=30, validator=not_negative)
    nearest: int = attrs.field(default=100, validator=not_negative)
    tile: int = tile_field(64)

    @property
    def whole_prompt(self) -> bool:
        return True

    def prompt(self, view: PromptView) -> Reads:
        end, tiles = view.keys.shape[1], view.tiles(self.tile)
        vertical = min(max(self.vertical, self.first), end)
        slash = min(max(self.slash, self.nearest), end)
        columns, blocks = [], []
        for head in range(view.keys.shape[0]):
            weights = last_weights(view, self.queries, head)
            tokens, distances = weights.sum(-2), along_diagonals(weights)
            tokens[:, : self.first] = float("inf")
            distances[:, max(end - self.nearest, 0) :] = float("inf")
            columns.append(tokens.sort(dim=-1, descending=True, stable=True).indices[:, :vertical])
            far = best(distances, slash).flip(-1)  # by distance
            blocks.append(by_distance(_touched(far, self.tile, tiles.stop), tiles))
        return Reads(torch.cat(blocks), torch.cat(columns)[:, None])


def _touched(far: Tensor, tile: int, most: int) -> Tensor:
    """Numbers of blocks back `[..., most]` that the marked distances `[..., N]` touch."""
    padded = torch.nn.functional.pad(far, (0, most * tile - far.shape[-1]))
    rows = padded.unflatten(-1, (most, tile))
    found = rows.any(-1)
    # What is not a whole number of blocks back crosses into the block before.
    found[..., 1:] |= rows[..., :-1, 1:].any(-1)
    return cast(Tensor, found)
