"""Attention of one decoded token a sequence over ring and pages."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..ops import POSITION_MASK, Heads, Pages, Ring, check_asked, ring_slot
from ._logits import logits, softmax, widened


def paged_decode(
    query: Tensor,
    pages: Pages,
    heads: Heads,
    ring: Ring,
    lengths: Tensor,
    active: Tensor,
    window: int,
    scale: float,
    selected: Tensor | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Attention `[B, Hq, Dv]` over the local window and the global tokens: `Ops.paged_decode`."""
    check_asked("paged_decode", query.shape[1], softcap, sinks, chunk)
    if rows is not None:
        index = rows.long()
        heads, ring = Heads(*(x[index] for x in heads)), Ring(*(x[index] for x in ring))
        lengths, active = lengths[index], active[index]
    table, counts = heads
    ring_k, ring_v, _ = ring
    batch, kv_heads, slots, dim = ring_k.shape
    size = pages.k.shape[1]
    if batch == 1 and selected is None and chunk is None:
        held = counts[0].tolist()
        if held == held[:1] * kv_heads:
            if not bool(active):
                return query.new_zeros(1, query.shape[1], ring_v.shape[3])
            return _even(
                query, pages, table, held[0], ring, int(lengths), window, scale, softcap, sinks
            )
    if selected is not None and selected.shape[1] != kv_heads:
        repeat = selected.shape[1] // kv_heads
        table, counts = table.repeat_interleave(repeat, 1), counts.repeat_interleave(repeat, 1)
        ring_k, ring_v = ring_k.repeat_interleave(repeat, 1), ring_v.repeat_interleave(repeat, 1)
        kv_heads = selected.shape[1]
    run = 0
    if selected is None:
        used = -(-int(counts.max()) // size)
        ids = table[:, :, :used]
        start = torch.arange(used, device=table.device) * size
        first, run, stride = _run(table, used)
    else:
        ids = table.gather(2, selected.clamp(min=0).long())
        # An unselected entry starts past every count, so none of its tokens is valid.
        start = torch.where(selected >= 0, selected * size, torch.iinfo(torch.int32).max - size)
    # Keys and values in up to three parts: pages that lie in a row, other pages, the ring.
    parts = [(ring_k, ring_v)]
    if ids.shape[2] > run:
        flat = ids[:, :, run:].reshape(-1)
        shape = (batch, kv_heads, (ids.shape[2] - run) * size, -1)
        gathered = [x.index_select(0, flat).view(shape) for x in (pages.k, pages.v)]
        parts.insert(0, (gathered[0], gathered[1]))
    if run:
        place = (batch, kv_heads, run * size), (first, stride)
        parts.insert(0, (_lying(pages.k, *place), _lying(pages.v, *place)))

    q = query.view(batch, kv_heads, -1, dim)
    scores = torch.cat([logits(q, k, scale, softcap) for k, _ in parts], -1)
    token = start[..., None] + torch.arange(size, device=table.device)
    token = token.expand(batch, kv_heads, -1, size).flatten(2)
    back = ring.slot(lengths[:, None] - torch.arange(slots, device=table.device))
    reach, far = (lengths + 1).clamp_(max=window), token < counts[..., None]
    if chunk is not None:
        reach = reach.minimum(lengths % chunk + 1)
        at = (pages.meta[ids.long()] & POSITION_MASK).flatten(2)
        far &= at >= (lengths - lengths % chunk)[:, None, None]
    near = (back < reach[:, None])[:, None].expand(-1, kv_heads, -1)
    hidden = torch.cat([far, near], -1).logical_not_()[:, :, None]
    scores.masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        sinks = sinks.view(kv_heads, -1)
    weights = softmax(scores, sinks).to(ring_v.dtype)
    shares = widened(weights).split([v.shape[2] for _, v in parts], -1)
    out = sum(share @ widened(v) for share, (_, v) in zip(shares, parts, strict=True))
    out = out.view(batch, -1, ring_v.shape[3]).to(query.dtype)
    return out if bool(active.all()) else out * active[:, None, None]


def _even(
    query: Tensor, pages: Pages, table: Tensor, held: int, ring: Ring, length: int, window: int,
    scale: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """One sequence whose heads hold as many tokens each: nothing is masked but slots of the ring.

    On a CPU, which reads three products of keys faster than it calls operations.
    """
    _, kv_heads, slots, dim = ring.k.shape
    size, dim_v = pages.k.shape[1], ring.v.shape[3]
    first, run, stride = _run(table, -(-held // size))
    lying = min(run * size, held)
    parts = [(ring.k[0], ring.v[0])]
    if held > lying:
        flat = table[0, :, run : -(-held // size)].reshape(-1)
        gathered = [x.index_select(0, flat) for x in (pages.k, pages.v)]
        k, v = (x.view(kv_heads, -1, x.shape[2])[:, : held - lying] for x in gathered)
        parts.insert(0, (k, v))
    if lying:
        place = (1, kv_heads, lying), (first, stride)
        parts.insert(0, (_lying(pages.k, *place)[0], _lying(pages.v, *place)[0]))
    q = widened(query).view(kv_heads, -1, dim)
    scores = torch.cat([torch.bmm(q, widened(k).mT) for k, _ in parts], 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    _hide_in_ring(scores[..., held:], length, window)
    weights = softmax(scores, None if sinks is None else sinks.view(kv_heads, -1))
    weights, at = widened(weights.to(ring.v.dtype)), held + slots
    out = weights.new_zeros(kv_heads, q.shape[1], dim_v)
    for _, v in reversed(parts):
        at -= v.shape[1]
        out.baddbmm_(weights[..., at : at + v.shape[1]], widened(v))
    return out.view(1, -1, dim_v).to(query.dtype)


def _lying(store: Tensor, shape: tuple[int, int, int], place: tuple[int, int]) -> Tensor:
    """Tokens `[B, Hkv, N, D]` of heads whose pages lie in a row: the first page, and a stride."""
    (_, kv_heads, _), (first, stride), (size, dim) = shape, place, store.shape[1:]
    page = size * dim
    strides = (kv_heads * stride * page, stride * page, dim, 1)
    return store.as_strided((*shape, dim), strides, store.storage_offset() + first * page)


def _hide_in_ring(scores: Tensor, length: int, window: int) -> None:
    """Hides the slots `[..., slots]` outside the window that ends at position `length`."""
    slots = scores.shape[-1]
    low = ring_slot(length + 1, slots)
    high = low + slots - min(window, length + 1)
    scores[..., low:high] = float("-inf")
    if high > slots:
        scores[..., : high - slots] = float("-inf")


# Tables change once in `page_size` tokens: the last answer for each, with the version it is for.
_RUNS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _run(table: Tensor, used: int) -> tuple[int, int, int]:
    """First page, length and stride of the rows of pages that a prompt left, head after head.

    Looks at the first `used` pages of each head of `table` `[B, Hkv, M]`. The first `length` of
    head i (counted over sequences) are `first + i * stride` and on, so that they can be read where
    they lie. Length 0 if there are none, or if heads are ragged.
    """
    if table.is_inference():  # such tensors have no version
        return _find_run(table[:, :, :used])
    version = (table._version, used)
    before = _RUNS.get(table)
    if before is None or before[0] != version:
        before = _RUNS[table] = (version, _find_run(table[:, :, :used]))
    return before[1]


def _find_run(ids: Tensor) -> tuple[int, int, int]:
    rows = ids.flatten(0, 1)
    if rows.numel() == 0:
        return 0, 0, 0
    heads, width = rows.shape
    first = int(rows[0, 0])
    stride = int(rows[1, 0]) - first if heads > 1 else width
    wanted = torch.arange(heads, device=ids.device)[:, None] * stride + first
    wanted = wanted + torch.arange(width, device=ids.device)
    same = (rows == wanted).all(0).tolist()
    run = same.index(False) if False in same else width
    return first, max(min(run, stride), 0), stride
