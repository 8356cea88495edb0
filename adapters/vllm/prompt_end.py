"""What an eviction leaves of a request when its prompt has ended, in the request's own arena.

Nothing goes back to vLLM: pages that heads give back are the next ones that heads of the same
request take, before the arena's others.
"""

from __future__ import annotations

import attrs
import torch

from ...errors import UnsupportedError
from ...eviction import EvictionView, StoredTokens
from ...ops import Heads, Ring, pages_of
from .plan import PAGE
from .reading import summarize
from .row_layer import RowLayer
from .rows import Rows
from .step import Prompt, prompt_of, sent


@attrs.frozen
class Ends:
    """What the scheduler knows of a forward's rows, where an eviction wants to know.

    `prompts` are the tokens of the prompts of requests that begin, `blocks` what each request has,
    `ended` the rows whose prompts ended with the last forward.
    """

    prompts: dict[int, int]
    blocks: dict[int, int]
    ended: tuple[int, ...]


def hear(rows: Rows, ends: Ends) -> None:
    """Does what is due, before a forward and after its `Rows.begin`; nothing waits."""
    rows.ends.update(ends.prompts)
    if ends.blocks:
        pages = [n * rows.plan.pages_per_block for n in ends.blocks.values()]
        at, room = sent([list(ends.blocks), pages], rows.spec.device)[:, : len(pages)]
        rows.arenas.room[at.long()] = room
    for row in ends.ended:
        for layer in rows.layers:
            end_prompt(rows, layer, row)


def parts_of(rows: Rows, prompt: Prompt) -> tuple[Prompt, ...]:
    """A part of a prompt, or two where the request's own prompt ends inside it.

    The rest is what a preempted request had generated.
    """
    start, added, device = prompt.seg.start[0], prompt.seg.cu_q[1], rows.spec.device
    end = rows.ends.get(prompt.row)
    if rows.eviction is None or end is None or not start < end < start + added:
        return (prompt,)
    window, kept = rows.window, rows.plan.kept(end)
    leaving = max(end - window, 0) - max(start - window, 0)
    held = [[min(n + leaving, kept) for n in heads] for heads in prompt.held]
    own = end - start
    return (
        prompt_of(prompt.row, prompt.first, start, own, window, prompt.held, device, ends=True),
        prompt_of(prompt.row, prompt.first + own, end, added - own, window, held, device),
    )


def end_prompt(rows: Rows, layer: RowLayer, row: int) -> None:
    """Leaves what the eviction keeps of one layer of a row; its heads' last pages are spare."""
    length, device, arenas = rows.ends[row], rows.spec.device, rows.arenas
    columns = pages_of(max(length - rows.window, 0), PAGE)
    assert rows.eviction is not None and layer.queries is not None and rows.plan.budget is not None
    assert arenas.spare is not None and arenas.spared is not None
    if not columns:
        return
    here = slice(row, row + 1)
    table, counts = layer.table[here, :, :columns], layer.counts[here]
    stored = StoredTokens(
        rows.pages, Heads(table, counts), Ring(*(x[here] for x in layer.ring)),
        layer.queries[here], torch.full((1,), length, device=device), rows.window,
        rows.spec.softmax_scale, None, None, _no_view,
    )  # fmt: skip
    scores = rows.eviction.at(layer.index).scores(rows.ops, stored)
    valid = torch.arange(columns * PAGE, device=device) < counts[..., None]
    target = torch.full_like(counts, rows.plan.kept(length), dtype=torch.int64)
    keep = rows.plan.budget.keep(scores, valid, target, rows.window, rows.ops.keep_best)
    after = keep.sum(-1, dtype=torch.int32)
    starts = torch.arange(counts.numel(), device=device) * keep.shape[2]
    moved = torch.where(after < counts, counts, 0).flatten()
    rows.ops.move_kept(
        rows.pages, table.flatten(0, 1), table.flatten(0, 1), keep.flatten(), starts, moved
    )
    column = torch.arange(columns, device=device)
    used, had = (pages_of(n, PAGE)[0, :, None] for n in (after, counts))
    gone, nobodys = ((column >= used) & (column < had)).flatten(), arenas.spare.shape[1] - 1
    left = arenas.taken[row] - gone.sum(dtype=torch.int32)
    number = torch.where(gone, left + gone.cumsum(0) - 1, nobodys)
    arenas.spare[row].scatter_(0, number, table.flatten())
    arenas.spared[row] = torch.maximum(arenas.spared[row], arenas.taken[row])
    arenas.taken[row] = left
    layer.counts[row] = after[0]
    if not layer.selection.neutral:
        most = pages_of(rows.plan.kept(length), PAGE)
        summarize(rows, layer, row, torch.zeros_like(after[0]), most)


def _no_view() -> EvictionView:
    raise UnsupportedError("kvpolicy: on vLLM an eviction sees what is stored by ops alone")
