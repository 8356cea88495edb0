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

from ...adapters.hf.models import served
from ...adapters.hf.rule.own_run import own_attention
from ...adapters.hf.rule.probe_attention import scores_of
from ...adapters.hf.rule.untouched import all_named
from ...adapters.hf.wrappers import base_of
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
    """Sums, by layer and query head, the attention that falls on tokens not read.

    `read` has what each layer read at each decoded token; `done` of these are summed.
    """

    def __init__(self, read: list[list[Tensor]], layers: int, heads: int, chunk: int) -> None:
        self.read, self.chunk, self.done = read, chunk, 0
        self.total = torch.zeros(layers, heads, dtype=torch.float64)

    def add(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        """`query` `[Hq, C, D]` of decoded tokens, `key` `[Hkv, N, D]` up to the last of them.

        The mass of `sinks` `[Hq]` is on no token.
        """
        heads, tokens = query.shape[0], key.shape[1]
        key = key.float().repeat_interleave(heads // key.shape[0], 0)
        for begin in range(0, query.shape[1], self.chunk):
            part = query[:, begin : begin + self.chunk].float()
            at = torch.arange(part.shape[1], device=key.device) + begin
            at = at + tokens - query.shape[1]
            logits = part @ key.transpose(1, 2) * scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            hidden = torch.arange(tokens, device=key.device) > at[:, None]
            logits = logits.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                column = sinks.to(logits)[:, None, None].expand(*logits.shape[:2], 1)
                logits = torch.cat([logits, column], -1)
            weights = logits.softmax(-1)[..., :tokens]
            first = self.done + begin
            steps = self.read[first : first + part.shape[1]]
            missing = torch.zeros(heads, len(steps), tokens, dtype=torch.bool)
            for row, step in enumerate(steps):
                seen = step[layer]
                unread = ~seen.repeat_interleave(heads // len(seen), 0)
                missing[:, row, : seen.shape[1]] = unread
            lost = (weights * missing.to(key.device)).double().sum((1, 2))
            self.total[layer, :heads] += lost.cpu()


class _Look:
    """What an attention module's calls in one forward add to, by layer; None adds to nothing."""

    def __init__(self, mass: LostMass, own: str | None, layers: list[int | None]) -> None:
        self.mass, self.own, self.layers, self.calls = mass, own, layers, 0

    def next(self) -> int | None:
        self.calls += 1
        return self.layers[(self.calls - 1) % len(self.layers)]


@contextmanager
def observed(model: PreTrainedModel, mass: LostMass) -> Iterator[None]:
    """The model's own attention, which also adds up lost mass of layers that policies manage.

    A layer that reads another's keys adds nothing.
    """
    known, base = served(model), base_of(model)
    own = base.config._attn_implementation
    looks: dict[Any, _Look] = {}
    for layer in known.probe.layers:
        module = base.get_submodule(layer.module)
        index = known.places[layer.reads]
        acts = not layer.shared and known.layers[index].window is None
        looks.setdefault(module, _Look(mass, own, [])).layers.append(index if acts else None)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[own or "eager"])
    try:
        for module, look in looks.items():
            module.__dict__[_SLOT] = look
        with all_named(base, NAME):
            yield
    finally:
        for module in looks:
            module.__dict__.pop(_SLOT, None)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    look: _Look = module.__dict__[_SLOT]
    layer = look.next()
    if layer is not None:
        scores = scores_of(query, kwargs.get("scaling"), kwargs)
        assert not isinstance(scores, str)  # the check by which it is served
        rules = scores.scale, scores.softcap, scores.sinks
        look.mass.add(layer, query[0], key[0], *rules)
    named = look.own not in (None, "eager")
    function: Any = ALL_ATTENTION_FUNCTIONS[look.own] if named else own_attention(module)
    found: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, **kwargs)
    return found


AttentionInterface.register(NAME, _attention)
