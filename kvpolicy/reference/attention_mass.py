"""What queries gave the tokens: columns of the attention matrix, added up or their maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import ADMITTED, POSITION_MASK, Heads, Numbers, Pages, Ring, check_asked
from ._logits import logits, softmax
from .page_io import read_pages

_LOGITS = 1 << 22  # logits that a tile of queries may have


def attention_mass(
    numbers: Numbers,
    pages: Pages,
    heads: Heads,
    ring: Ring,
    query: Tensor,
    lengths: Tensor,
    first: Tensor,
    last: Tensor,
    window: int,
    scale: float,
    *,
    most: int,
    accumulates: str,
    group: str,
    shifts: tuple[int, int] = (0, 0),
    among: tuple[int, int, int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> None:
    """Adds to numbers the weights that queries give: `Ops.attention_mass`."""
    check_asked("attention_mass", query.shape[1], softcap, sinks, chunk)
    kv_heads = ring.k.shape[1]
    spans = zip(lengths.tolist(), first.clamp(min=0).tolist(), last.tolist(), strict=True)
    for row, (length, low, high) in enumerate(spans):
        if low >= high:
            continue
        used = -(-int(heads.counts[row].max()) // pages.k.shape[1])
        k, _, meta = read_pages(pages, heads.table[row, :, :used])
        far = (meta & POSITION_MASK).flatten(1)
        there = torch.arange(far.shape[1], device=far.device) < heads.counts[row, :, None]
        near = _positions(length, ring.slots, shifts[1], far.device)
        left = (near < length - window) & ((ring.flags[row] & ADMITTED) > 0)
        keys = torch.cat([k.flatten(1, 2), ring.k[row]], 1)
        keys = keys.masked_fill(~torch.cat([there, near.expand_as(left) >= 0], 1)[..., None], 0)
        rows = query[row].unflatten(0, (kv_heads, -1))
        tile = max(_LOGITS // (query.shape[1] * keys.shape[1]), 1)
        for start in range(low, high, tile):
            at = torch.arange(start, min(start + tile, high), device=far.device)[:, None]
            seen = (near >= 0) & (near <= at) & (at - near < window)
            ok = torch.cat(
                [there[:, None] & (far[:, None] <= at), seen & ~left[:, None]], -1
            )  # [Hkv, q, N + S]
            where = torch.cat([far, near.expand_as(left)], 1)[:, None]
            if chunk is not None:
                ok &= where // chunk == at // chunk
            looked = ok
            if among is not None:
                looked = (where >= among[1]) & (where < among[2])
                ok &= looked | (where < among[0]) | (where >= among[3])
            q = rows[:, :, (at[:, 0] - shifts[0]) % query.shape[2]]
            scores = logits(q, keys[:, None], scale, softcap)
            scores = scores.masked_fill_(~ok[:, None], float("-inf"))
            joins = None if sinks is None else sinks.view(kv_heads, -1, 1)
            weights = _combined(softmax(scores, joins).nan_to_num(0.0), group)
            weights = weights.masked_fill(~looked, 0)
            _add(numbers, row, weights, far.shape[1], accumulates)


def _positions(length: int, slots: int, shift: int, device: torch.device) -> Tensor:
    """The position that each slot holds of a sequence of `length`, negative where none."""
    newest = length - 1
    return newest - (newest - shift - torch.arange(slots, device=device)) % slots


def _combined(weights: Tensor, group: str) -> Tensor:
    """Weights `[Hkv, G, q, N]` of query heads to `[Hkv, q, N]`."""
    if group == "max":
        return weights.amax(1)
    return weights.sum(1) if group == "sum" else weights.mean(1)


def _add(numbers: Numbers, row: int, weights: Tensor, far: int, accumulates: str) -> None:
    """Into the numbers of a sequence; the first `far` columns are its global tokens."""
    mass = weights.amax(1) if accumulates == "max" else weights.sum(1)
    width = min(far, numbers.stored.shape[2])  # slots beyond the counts weigh nothing
    for target, more in (
        (numbers.stored[row, :, :width], mass[:, :width]),
        (numbers.recent[row], mass[:, far:]),
    ):
        if accumulates == "max":
            target.copy_(torch.maximum(target, more.to(target)))
        else:
            target.add_(more.to(target))
