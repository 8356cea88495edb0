"""XAttention's choice of blocks: antidiagonal sums, and the heaviest blocks of each tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Segments, tile_spans

_WHOLE = 1 << 30


def antidiagonal_blocks(
    query: Tensor,
    keys: Tensor,
    present: Tensor,
    segments: Segments,
    scale: float,
    tile: int,
    stride: int,
    threshold: float,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Blocks `[Hq, N, M]` that tiles read: `Ops.antidiagonal_blocks`."""
    heads, spans, base, tiles = query.shape[0], tile_spans(segments, tile), 0, []
    most = max((stop for _, stop in spans), default=0)
    for row, (low, high) in enumerate(spans):
        start = segments.start[row]
        end = start + segments.cu_q[row + 1] - segments.cu_q[row]
        for number in range(low, high):
            begin, stop = max(number * tile, start), min((number + 1) * tile, end)
            at = segments.cu_q[row] + begin - start
            own = query.new_zeros(heads, tile, query.shape[2])
            own[:, begin - number * tile : stop - number * tile] = query[:, at : at + stop - begin]
            past = slice(base, base + (number + 1) * tile)
            logits = _logits(own, keys[:, past], present[:, past], stride, scale, softcap)
            asked = slice((begin - number * tile) // stride, -(-(stop - number * tile) // stride))
            weights = logits[:, asked].softmax(-1).nan_to_num(0)  # rows without any key
            mass = weights.view(heads, weights.shape[1], number + 1, -1).sum(-1).mean(1)
            kept = torch.zeros(heads, most, dtype=torch.bool, device=query.device)
            for head in range(heads):
                kept[head, : number + 1] = _heaviest(mass[head], threshold)
            tiles.append(kept)
        base += high * tile
    return torch.stack(tiles, 1)


def _logits(
    query: Tensor, keys: Tensor, present: Tensor, stride: int, scale: float, softcap: float | None
) -> Tensor:
    """Logits `[Hq, T / S, N / S]` of groups of a tile's queries and of the keys up to its end."""
    each, dtype = query.shape[0] // keys.shape[0], torch.promote_types(query.dtype, torch.float32)
    groups = keys.shape[1] // stride
    held = present.view(-1, groups, stride).sum(-1).repeat_interleave(each, 0)[:, None]
    found = query.new_zeros(query.shape[0], query.shape[1] // stride, groups, dtype=dtype)
    for n in range(stride):
        k = keys[:, n::stride].to(dtype).repeat_interleave(each, 0)
        found += query[:, stride - 1 - n :: stride].to(dtype) @ k.mT
    found = found * (scale / held.clamp(min=1))
    if softcap is not None:
        found = softcap * (found / softcap).tanh()
    found = found + (held / stride).to(found.dtype).log()
    last = groups - query.shape[1] // stride + torch.arange(found.shape[1], device=query.device)
    later = torch.arange(groups, device=query.device) > last[:, None]
    return found.masked_fill(later, float("-inf"))


def _heaviest(mass: Tensor, threshold: float) -> Tensor:
    """Which of `[M]` blocks hold the wanted part of their mass, the first and last among them."""
    amounts = (mass * _WHOLE).round().long().tolist()
    last = len(amounts) - 1
    kept, needed = {0, last}, sum(amounts) * threshold
    held = sum(amounts[n] for n in kept)
    for n in sorted(range(1, last), key=lambda n: -amounts[n]):
        if held >= needed and threshold < 1:
            break
        kept.add(n)
        held += amounts[n]
    return torch.tensor([n in kept for n in range(last + 1)], device=mass.device)
