"""A press of kvpress as an eviction: its scores, and pages that are really freed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import attrs
import torch
from torch import Tensor

from .._fields import flag, not_negative, one_of, shown
from .._names import named
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import PressReads, When
from ..ops import Ops
from ..rope import Rope
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens
from .expected_attention import FIRST

# Stored keys and values `[H, n, D]` of a sequence, of its KV heads in a slice, so many of each.
Tokens = Callable[[int, slice, int], tuple[Tensor, Tensor]]


def _press(instance: KVPress, attribute: attrs.Attribute[Any], value: Any) -> None:
    if isinstance(value, type) or not _takes_six(getattr(value, "score", None)):
        raise TypeError(
            "press: wanted an object with score(module, hidden_states, keys, values, attentions, "
            f"kwargs), as kvpress's scoring presses are, got {shown(value)}"
        )


def _takes_six(function: Any) -> bool:
    try:
        inspect.signature(function).bind(*range(6))
    except (TypeError, ValueError):
        return False
    return True


@named
@attrs.frozen(kw_only=True, eq=False)
class KVPress(Eviction):
    """Scores tokens as an object with kvpress's `score` does; nothing of kvpress is imported.

    Called for one sequence and KV head at a time (with `across_heads` for all heads of a layer,
    which must hold as many tokens): keys and values `[1, H, n, D]` of the stored tokens and the
    window, no attention maps, and as module a stand-in with `config`, `head_dim`, `layer_idx`,
    `num_key_value_groups`, `rotary_emb` and, with `output_weight`, `o_proj.weight`.

    `hidden_states` are by `reads`: "queries", the last `inputs` queries before RoPE, side by side,
    for which the stand-in's `q_proj` is the identity; "statistics", rows for which `q_proj` gives
    queries with the mean and covariance of all the sequence's, after `skip` rows of zeros that
    such a press leaves out; "hidden", the last `inputs` attention inputs, without `q_proj`.
    `compression_ratio` and the like of the press count for nothing: `budget` does. Modules that a
    press tells by their class (norms, fused projections) do not matter: queries come as they are.
    Where nothing demands a window it is 1 token wide: what is kept is what the press would keep,
    and the newest token.

    Example:
        `CachePipeline(eviction=KVPress(press=KnormPress(), budget=Ratio(0.5)))`
    """

    press: Any = attrs.field(validator=_press)
    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    when: When = when_field()
    reads: PressReads = attrs.field(default="queries", validator=one_of(*get_args(PressReads)))
    inputs: int = attrs.field(default=64, validator=not_negative)
    skip: int = attrs.field(default=4, validator=not_negative)
    output_weight: bool = attrs.field(default=False, validator=flag)
    across_heads: bool = attrs.field(default=False, validator=flag)
    gathers_heads = True

    @property
    def prefers_window(self) -> int:
        return 1

    @property
    def queries(self) -> int:
        return self.inputs if self.reads == "queries" else 0

    @property
    def hidden(self) -> int:
        return self.inputs if self.reads == "hidden" else 0

    @property
    def query_stats(self) -> bool:
        return self.reads == "statistics"

    @property
    def query_skip(self) -> int:
        return self.skip if self.reads == "statistics" else 0

    @property
    def rope(self) -> bool:
        return True

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        if self.across_heads:
            return self.score(stored.view())

        def tokens(row: int, part: slice, count: int) -> tuple[Tensor, Tensor]:
            return stored.read(ops, row, part, slice(0, count))

        return self._scores(stored.view(), tokens)

    def score(self, view: EvictionView) -> Tensor:
        whole = view.whole() if self.across_heads else view

        def tokens(row: int, part: slice, count: int) -> tuple[Tensor, Tensor]:
            return whole.keys[row, part, :count], whole.values[row, part, :count]

        found = self._scores(whole, tokens)
        return found if whole is view else found[:, view.heads.start : view.heads.stop]

    def _scores(self, view: EvictionView, tokens: Tokens) -> Tensor:
        dtype, device = wide(view.recent_keys), view.valid.device
        found = torch.zeros(view.valid.shape, dtype=dtype, device=device)
        kv_heads = view.valid.shape[1]
        for row, used in enumerate(view.used):
            counts = view.valid[row, :, :used].sum(-1).tolist()
            parts = [slice(h, h + 1) for h in range(kv_heads)]
            if self.across_heads:
                parts = [slice(0, kv_heads)]
                if len(set(counts)) > 1:
                    raise ValueError(
                        f"across_heads: wanted heads that hold as many tokens, got {counts}; an "
                        "admission or budget by head makes them differ"
                    )
            for part in parts:
                count = counts[part.start]
                if count:
                    found[row, part, :count] = self._scored(
                        view, row, part, tokens(row, part, count)
                    )
        return found

    def _scored(
        self, view: EvictionView, row: int, part: slice, far: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Scores `[H, n]` of the n stored keys and values of the heads `part` of a sequence."""
        near, count = view.recent_valid[row], far[0].shape[1]
        keys, values = (
            torch.cat([x, recent[row, part][:, near]], 1)[None]
            for x, recent in zip(far, (view.recent_keys, view.recent_values), strict=True)
        )
        length = int(view.lengths[row])
        hidden = self._inputs(view, row, part)
        module = _stand_in(view, part, length - hidden.shape[1], self.reads != "hidden")
        if self.output_weight:
            weight = view.output_weight[part.start * view.group : part.stop * view.group]
            module.o_proj = SimpleNamespace(weight=weight.flatten(0, 1).T)
            module.config.hidden_size = weight.shape[2]
        at = torch.arange(hidden.shape[1], device=hidden.device)[None]
        kwargs = {"position_embeddings": module.rotary_emb(hidden, at)}
        scores = self.press.score(module, hidden, keys, values, None, kwargs)
        wanted = [1, keys.shape[1], keys.shape[2]]
        if not isinstance(scores, Tensor) or list(scores.shape) != wanted:
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"{type(self.press).__name__}.score: wanted {wanted}, got {got}")
        return scores[0, :, :count].to(wide(view.recent_keys)).clamp(max=FIRST)

    def _inputs(self, view: EvictionView, row: int, part: slice) -> Tensor:
        """What stands for hidden states, `[1, n, channels]`."""
        heads = slice(part.start * view.group, part.stop * view.group)
        if self.reads == "hidden":
            assert view.hidden is not None and view.hidden_valid is not None
            return view.hidden[row, view.hidden_valid[row]][None]
        if self.reads == "statistics":
            _, mean, covariance = (x[row] for x in view.query_stats)
            found = _of_statistics(mean[heads], covariance[heads])
            zeros = found.new_zeros(len(found), self.skip, found.shape[2])
            found = torch.cat([zeros, found], 1)
        else:
            assert view.queries is not None and view.query_valid is not None
            found = view.queries[row, heads][:, view.query_valid[row]]
            if view.rope is not None:
                end = int(view.lengths[row])
                angle = view.rope.angles(
                    torch.arange(end - found.shape[1], end, device=found.device)
                )
                factor = view.rope.factor
                wider = found.to(wide(found))
                back = view.rope.turned(wider, angle.cos() / factor, -angle.sin() / factor)
                found = back.to(found.dtype)
        return found.transpose(0, 1).flatten(1)[None]


def _of_statistics(mean: Tensor, covariance: Tensor) -> Tensor:
    """Queries `[H, 2 D, D]` that have this mean `[H, D]` and covariance `[H, D, D]`."""
    values, vectors = torch.linalg.eigh(covariance)
    away = (vectors * (values.clamp(min=0) * mean.shape[1]).sqrt()[:, None]).mT
    return torch.cat([mean[:, None] + away, mean[:, None] - away], 1)


def _stand_in(view: EvictionView, part: slice, before: int, projects: bool) -> SimpleNamespace:
    """What a press may ask of an attention module; its positions begin `before` the inputs."""
    kv_heads = part.stop - part.start
    dim = view.recent_keys.shape[3]
    config = SimpleNamespace(
        num_attention_heads=kv_heads * view.group, num_key_value_heads=kv_heads, head_dim=dim,
        hidden_size=kv_heads * view.group * dim,
    )  # fmt: skip
    module = SimpleNamespace(
        config=config, head_dim=dim, layer_idx=view.layer, num_key_value_groups=view.group,
        num_heads=config.num_attention_heads, scaling=view.scale,
        rotary_emb=_rotary(view.rope, dim, before),
    )  # fmt: skip
    if projects:
        module.q_proj = _Identity()
    return module


class _Identity:
    """A projection that changes nothing."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


def _rotary(rope: Rope | None, dim: int, before: int) -> Any:
    """cos and sin `[1, n, D]` as transformers' rotary modules give them, pairs `(f, f + D / 2)`."""
    if rope is not None and (2 * len(rope.frequencies) < dim or rope.interleaved or rope.sign < 0):
        raise ValueError(
            f"rope: presses turn all {dim} channels in pairs (f, f + {dim // 2}); the model does "
            "not"
        )

    def rotary(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        where = position_ids + before
        if rope is None:
            ones = torch.ones(*where.shape, dim, dtype=x.dtype, device=x.device)
            return ones, torch.zeros_like(ones)
        angle = rope.angles(where)
        angle = torch.cat([angle, angle], -1)
        return tuple((f(angle) * rope.factor).to(x.dtype) for f in (torch.cos, torch.sin))

    return rotary
