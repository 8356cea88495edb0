"""Writing decoded tokens on a CPU: some rows of memory, for which numpy takes a third of the time.

What torch takes for one token is its dispatch, an operator after the other in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import ADMITTED, MARKED, POSITION_BITS, Heads, Pages, Ring, ring_slot
from ._pages import extend_minmax, take_pages

Puts = list[tuple[Tensor, Tensor]]  # rings `[B, H, S, ...]`, and what a token of each puts there


def on_host(pages: Pages, puts: Puts) -> bool:
    """Whether all are plain tensors in the host's memory, and nothing has to be cast."""
    if pages.k.device.type != "cpu":
        return False
    for held, new in puts:
        if type(held) is not Tensor or type(new) is not Tensor or held.dtype != new.dtype:
            return False
    return True


def write_on_host(
    pages: Pages, heads: Heads, ring: Ring, puts: Puts, flags: Tensor | None, at: list[int],
    on: list[bool], window: int, *, minmax: bool, bits: int,
) -> None:  # fmt: skip
    """`Ops.decode_write` at positions `at` for the sequences that are `on`."""
    arrays = [(_array(held), _array(new.detach())) for held, new in puts]
    marks, given = ring.flags.numpy(), None if flags is None else flags.numpy()
    slots = marks.shape[2]
    for row, length in enumerate(at):
        if not on[row]:
            continue
        if length >= window:
            recent = arrays[0][0][row], arrays[1][0][row], marks[row]
            _promote(pages, heads, recent, row, length - window, minmax)
        marks[row, :, ring_slot(length, slots)] = bits if given is None else given[row] | bits
        for held, new in arrays:
            held[row, :, ring_slot(length, held.shape[2])] = new[row]


def _promote(
    pages: Pages, heads: Heads, recent: tuple[Any, Any, Any], row: int, position: int, minmax: bool
) -> None:
    """Appends a sequence's leaving token to the pages of the heads that admitted it.

    `recent` are its keys, values and flags in the ring, `[Hkv, S, ...]`.
    """
    marks, size = recent[2], pages.k.shape[1]
    slot = ring_slot(position, marks.shape[1])
    flags: list[int] = marks[:, slot].tolist()
    admitted: Any = [head for head, bit in enumerate(flags) if bit & ADMITTED]
    if not admitted:
        return
    table, counts = heads.table.numpy()[row], heads.counts.numpy()[row]
    before: list[int] = counts.tolist()
    held = [before[head] for head in admitted]
    full = [head for head in admitted if before[head] % size == 0]
    if full:
        fresh = torch.tensor([full, [before[head] // size for head in full]])
        take_pages(pages, heads.table[row], fresh[0], fresh[1])
    meta: Any = [position | ((flags[head] & MARKED) > 0) << POSITION_BITS for head in admitted]
    if held == held[:1] * len(flags):  # a slot of a page each
        column, offset = divmod(held[0], size)
        page, leaving = table[:, column], [x[:, slot] for x in recent]
        meta, heads_on = meta[0] if meta == meta[:1] * len(meta) else meta, slice(None)
    else:
        column, offset = [n // size for n in held], [n % size for n in held]
        page, leaving = table[admitted, column], [x[admitted, slot] for x in recent]
        heads_on = admitted
    _array(pages.k)[page, offset] = leaving[0]
    _array(pages.v)[page, offset] = leaving[1]
    pages.meta.numpy()[page, offset] = meta
    if minmax:
        at = torch.from_numpy(page).long(), torch.tensor(offset).expand(len(admitted))
        extend_minmax(pages, *at, torch.from_numpy(leaving[0]).view(pages.k.dtype))
    counts[heads_on] += 1  # last, so that what is broken off holds no token by halves


def _array(x: Tensor) -> Any:
    """The memory of a tensor; numpy has no bfloat16, and rows are only copied."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
