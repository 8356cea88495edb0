"""Attention as a pipeline's cache computes it, from what an attention function is given."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from .kinds import LayerKind
from .probe_masks import seen

# Arguments of an attention function by what becomes of them.
SINKS = ("s_aux", "sinks")
HONOURED = ("scaling", "softcap", *SINKS)
# Cut what a query sees, which the layer's kind says too; or hold no more than the cache knows.
KNOWN = (
    "sliding_window",
    "position_ids",
    "use_cache",
    "cache_position",
    "past_key_values",
    "return_dict",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "tie_last_hidden_states",
)


@attrs.frozen(kw_only=True, eq=False)
class Scores:
    """What makes scores of queries and keys.

    Attributes:
        scale: factor of q.k.
        softcap: c of `c * tanh(scale * q.k / c)`, or None.
        sinks: logits `[Hq]` that join the softmax, or None.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None


def unknown_argument(dropout: Any, causal: Any, given: dict[str, Any]) -> str:
    """The name of an argument that would change the result, "" if there is none."""
    if dropout:
        return "dropout"
    if causal is False:
        return "is_causal=False"
    for name, value in given.items():
        if value is not None and name not in HONOURED and name not in KNOWN:
            return name
    return ""


def scores_of(query: Tensor, scaling: Any, given: dict[str, Any]) -> Scores | str:
    """What the arguments say of the scores, or the reason why they say nothing."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = given.get("softcap")
    sinks = next((given[name] for name in SINKS if given.get(name) is not None), None)
    for name, value in (("scaling", scale), ("softcap", softcap)):
        if value is not None and not isinstance(value, (int, float)):
            return f"wanted a number as {name}, got {type(value).__name__}"
    if sinks is not None and (not isinstance(sinks, Tensor) or sinks.numel() != query.shape[1]):
        shape = tuple(getattr(sinks, "shape", ()))
        return f"wanted a sink for each of {query.shape[1]} query heads, got shape {shape}"
    return Scores(scale=float(scale), softcap=softcap, sinks=sinks)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, kind: LayerKind, past: int
) -> Tensor:
    """Attention `[B, S, Hq, Dv]` in float64.

    `query` is `[B, Hq, S, D]`, `key` and `value` `[B, Hkv, T, D]` the last T columns up to the last
    query; `past` columns came before the first query.
    """
    q, k, v = query.double(), key.double(), value.double()
    groups, columns, length = q.shape[1] // k.shape[1], q.shape[2], past + q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = (q @ k.transpose(2, 3)) * scores.scale
    if scores.softcap is not None:
        logits = torch.tanh(logits / scores.softcap) * scores.softcap
    rows = torch.arange(past, length, device=q.device)[:, None]
    places = torch.arange(length - k.shape[2], length, device=q.device)
    logits = logits.masked_fill(~seen(rows, places, kind.window, kind.chunk), -torch.inf)
    if scores.sinks is None:
        weights = logits.softmax(-1)
    else:
        sinks = scores.sinks.to(q).reshape(1, -1, 1, 1).expand(*q.shape[:2], columns, 1)
        weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ v).transpose(1, 2)


def rounding(dtype: torch.dtype) -> float:
    """The relative rounding of attention in `dtype`: eager ones take the softmax in float32."""
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def allowed(query: Tensor, key: Tensor, value: Tensor, scores: Scores, dtype: torch.dtype) -> float:
    """How far attention computed in `dtype` may be from the exact one, elementwise.

    A dot product carries at most a few roundings of `|q| |k|`, which the exponential makes a
    relative error of the weights; weights and sums carry a few more. Values bound the result.
    """
    eps = rounding(dtype)
    size = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * abs(scores.scale)
    relative = torch.expm1(8 * eps * size.clamp(max=1 / eps)) + 16 * eps
    return float(relative * value.double().abs().max())
