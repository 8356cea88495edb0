"""The attention that a cache's heads miss, measured inside full attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...adapters.hf.wrappers import decoder_of
from ...ops import POSITION_MASK
from ...store import CacheState

NAME = "kvpolicy_lost_mass"
_SLOT = "_kvpolicy_lost_mass"


def read_by_last_token(state: CacheState, index: int, length: int) -> Tensor:
    """Tokens that the last decoded token read, bool `[Hkv or Hq, length]` on the host.

    For one sequence, between its layers' attention and the commit: `length` counts the decoded
    token. A selection per query head gives a row a query head.
    """
    layer, size = state.layers[index], state.spec.page_size
    near = torch.arange(length) >= length - layer.window
    heads = layer.table.shape[1]
    if layer.slides:
        return near.expand(heads, -1)
    counts, width = layer.counts[0].cpu(), layer.table.shape[2]
    used = max(-(-int(counts.max()) // size), 1)
    table = layer.table[0, :, :used]
    meta = state.ops.read_pages(layer.pool.pages, table)[2].flatten(1).cpu()
    valid = torch.arange(used * size) < counts[:, None]
    if layer.selected is not None:
        chosen = layer.selected[0].cpu()
        rows = chosen.shape[0] // heads
        meta, valid = (x.repeat_interleave(rows, 0) for x in (meta, valid))
        # Column `width` takes the -1 of places that chose nothing.
        picked = torch.zeros(len(chosen), width + 1, dtype=torch.bool)
        picked.scatter_(1, torch.where(chosen < 0, width, chosen).long(), True)
        valid = valid & picked[:, :used].repeat_interleave(size, 1)
    held = torch.zeros(len(meta), length + 1, dtype=torch.bool)
    held.scatter_(1, torch.where(valid, meta & POSITION_MASK, length).long(), True)
    return held[:, :length] | near


class LostMass:
    """Sums, by layer and query head, the attention that falls on tokens not read."""

    def __init__(self, read: list[list[Tensor]], layers: int, heads: int, chunk: int) -> None:
        self.read, self.chunk = read, chunk
        self.total = torch.zeros(layers, heads, dtype=torch.float64)

    def add(self, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """`query` `[Hq, C, D]` of decoded tokens, `key` `[Hkv, N, D]` up to the last of them."""
        heads, tokens = query.shape[0], key.shape[1]
        key = key.float().repeat_interleave(heads // key.shape[0], 0)
        for begin in range(0, query.shape[1], self.chunk):
            part = query[:, begin : begin + self.chunk].float()
            at = torch.arange(part.shape[1], device=key.device) + begin
            at = at + tokens - query.shape[1]
            logits = part @ key.transpose(1, 2) * scale
            hidden = torch.arange(tokens, device=key.device) > at[:, None]
            weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
            steps = self.read[begin : begin + part.shape[1]]
            missing = torch.zeros(heads, len(steps), tokens, dtype=torch.bool)
            for row, step in enumerate(steps):
                seen = step[layer]
                unread = ~seen.repeat_interleave(heads // len(seen), 0)
                missing[:, row, : seen.shape[1]] = unread
            lost = (weights * missing.to(key.device)).double().sum((1, 2))
            self.total[layer] += lost.cpu()


@contextmanager
def observed(model: PreTrainedModel, mass: LostMass) -> Iterator[None]:
    """SDPA that also adds up lost mass."""
    previous, config = model.config._attn_implementation, decoder_of(model).config
    config.__dict__[_SLOT] = mass
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
        del config.__dict__[_SLOT]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if kwargs.get("sliding_window") is None:
        mass: LostMass = module.config.__dict__[_SLOT]
        mass.add(module.layer_idx, query[0], key[0], kwargs["scaling"])
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
