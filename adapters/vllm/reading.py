"""Reading prompts: a part of one row's prompt, in one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ...admission import Write
from ...ops import ADMITTED, Bounds, Heads, Ring, pages_of
from .plan import PAGE
from .row_layer import RowLayer
from .rows import Rows
from .step import Prompt


def read_prompt(
    rows: Rows, prompt: Prompt, index: int, query: Tensor, key: Tensor, value: Tensor,
    key_pre: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention `[T, Hq, D]` of the new tokens `[T, H, D]` of one layer."""
    layer, seg, row = rows.layers[index], prompt.seg, slice(prompt.row, prompt.row + 1)
    key, value, query = (x.transpose(0, 1) for x in (key, value, query))
    positions = torch.arange(seg.start[0], seg.start[0] + seg.cu_q[1], device=key.device)
    write = Write(
        key, value, positions, seg.cu_q_dev, index, rows.spec.head_ids,
        key_pre=None if key_pre is None else key_pre.transpose(0, 1),
    )  # fmt: skip
    decided, bits = layer.decide(write)
    if decided is None:
        decided = torch.full(key.shape[:2], bits, dtype=torch.uint8, device=key.device)
    if layer.queries is not None:
        last = min(layer.queries.shape[2], len(positions))
        slots = positions[-last:] % layer.queries.shape[2]
        layer.queries[prompt.row][:, slots] = query[:, -last:]
    ring = Ring(*(x[row] for x in layer.ring))
    (k, v, flags), _ = rows.ops.advance_ring(ring, key, value, decided, seg, undo=False)
    leaving = seg.cu_k[1] - rows.window
    if leaving > 0:
        first = seg.start[0] + seg.cu_q[1] - seg.cu_k[1]  # position of the first recent token
        flags = _store(rows, layer, prompt.row, k[:, :leaving], v[:, :leaving], flags, first)
    held = Heads(layer.table[row], layer.counts[row])
    return rows.ops.prefill_attention(
        query, k, v, flags, seg, rows.pages, held, rows.window, rows.spec.softmax_scale,
        _known(rows, prompt, index, max(leaving, 0)),
    ).transpose(0, 1)  # fmt: skip


def _known(rows: Rows, prompt: Prompt, index: int, leaving: int) -> Bounds:
    """What the host knows of a layer's counts once `leaving` tokens of each head left the window.

    It expects as many of them to be admitted as of the earlier ones, or as the plan expects.
    """
    held, plan = prompt.held[index], rows.plan
    past = max(prompt.seg.start[0] - rows.window, 0)
    share = plan.pages(rows.window + leaving) * PAGE / (plan.heads * max(leaving, 1))
    parts = [n / past if past else min(share, 1.0) for n in held]
    expected = [n + round(leaving * part) for n, part in zip(held, parts, strict=True)]
    return Bounds([[n + leaving for n in held]], [expected])


def _store(
    rows: Rows, layer: RowLayer, row: int, key: Tensor, value: Tensor, flags: Tensor, first: int
) -> Tensor:
    """Stores those of a row's leaving tokens `[Hkv, n, D]` that are admitted.

    Returns the flags `[Hkv, Tk]` without the bit of those that found no page.
    """
    count, device, arenas = key.shape[1], key.device, rows.arenas
    wanted = (flags[:, :count] & ADMITTED) > 0
    before = layer.counts[row].clone()
    running = before[:, None] + wanted.cumsum(1, dtype=torch.int32)  # [Hkv, n]
    have = pages_of(before, PAGE)
    # Heads are served in order while the arena has room.
    fresh = pages_of(running[:, -1], PAGE) - have
    asked = fresh.cumsum(0, dtype=torch.int32) - fresh
    granted = torch.minimum((arenas.room[row] - arenas.taken[row] - asked).clamp(min=0), fresh)
    number = arenas.taken[row] + granted.cumsum(0, dtype=torch.int32) - granted
    arenas.taken[row] += granted.sum()
    column = torch.arange(layer.table.shape[2], dtype=torch.int32, device=device)
    rank = column - have[:, None]
    given = (rank >= 0) & (rank < granted[:, None])
    page = arenas.page(row, number[:, None] + rank.clamp(min=0))
    layer.table[row] = torch.where(given, page, layer.table[row])
    limit = (have + granted) * PAGE
    stored = wanted & (running <= limit[:, None])
    at = torch.arange(first, first + count, dtype=torch.int32, device=device)
    rows.ops.append(
        rows.pages, layer.table, key, value, at.expand(len(before), -1).contiguous(),
        torch.where(stored, running - 1, -1), torch.full_like(at, row),
    )  # fmt: skip
    layer.counts[row] = torch.minimum(running[:, -1], limit)
    if not layer.selection.neutral:
        summarize(rows, layer, row, before, count // PAGE + 2)
    lost = wanted & ~stored
    arenas.refused[row] += lost.sum()
    kept = flags.clone()
    kept[:, :count] &= ~(lost.to(torch.uint8) * ADMITTED)
    return kept


def summarize(rows: Rows, layer: RowLayer, row: int, before: Tensor, span: int) -> None:
    """Computes the summaries of the pages, at most `span` a head, that tokens came to.

    Where they are fewer the last page is done again, so that the host need not know.
    """
    assert rows.pages.summary is not None
    after = layer.counts[row]
    last = (pages_of(after, PAGE) - 1).clamp(min=0)
    some = torch.arange(span, dtype=torch.int32, device=after.device)
    column = torch.minimum((before // PAGE)[:, None] + some, last[:, None])
    held = (after[:, None] - column * PAGE).clamp(1, PAGE).flatten()
    ids = layer.table[row].gather(1, column.long()).flatten()
    keys = rows.ops.read_pages(rows.pages, ids)[0]
    valid = torch.arange(PAGE, device=ids.device) < held[:, None]
    rows.ops.write_summary(rows.pages, ids, layer.selection.summarize(keys, valid))
