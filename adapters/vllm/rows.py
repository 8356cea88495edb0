"""What a worker keeps of requests: rings, tables and counts of each row, and their arenas.

A row is a place for one running request. Its number is the id of the request's first block, which
the manager takes from a set of as many blocks as there are rows (`manager.py`); row 0, the id of
vLLM's null block, is a place for padding, where nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ...admission import Admission, Write
from ...backend import resolve
from ...ops import ADMITTED, Heads, Pages, Ring, Segments, load, pages_of
from ...pipeline import CachePipeline
from ...spec import CacheSpec
from .plan import PAGE, Plan


@attrs.frozen(eq=False)
class Prompt:
    """One row's part of a call that brings several tokens, or its first one.

    `first` is where its tokens begin in the batch, `seg` its own segments.
    """

    row: int
    first: int
    seg: Segments


@attrs.frozen(eq=False)
class Step:
    """One forward: the rows that decode a token each, and those with a part of a prompt.

    `decoded` `[n]` are places in the batch, `rows` `[n]` theirs; `lengths` and `active` `[R]` are
    of all rows and count the tokens before this one. `tokens` are there in the batch.
    """

    tokens: int
    decoded: Tensor
    rows: Tensor
    lengths: Tensor
    active: Tensor
    prompts: tuple[Prompt, ...]


@attrs.define(eq=False)
class RowLayer:
    """One layer of all rows: `ring` `[R, Hkv, W, ...]`, `table` `[R, Hkv, M]`, `counts`."""

    index: int
    admission: Admission
    ring: Ring
    table: Tensor
    counts: Tensor


class Rows:
    """The state of `rows` requests, for `layers` of one model, over memory that vLLM owns."""

    def __init__(
        self, spec: CacheSpec, pipeline: CachePipeline, plan: Plan, rows: int, longest: int
    ) -> None:
        self.spec, self.plan, self.window = spec, plan, pipeline.window
        backend = resolve(pipeline.backend, spec.device)
        self.ops = load(backend)
        admission = pipeline.admission.place(spec.device, spec.dtype, backend)
        total, heads, dim = rows + 1, spec.kv_heads, spec.head_dim
        columns = max(pages_of(max(longest - self.window, 0), PAGE), 1)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(total, *shape, dtype=dtype, device=spec.device)

        self.layers = [
            RowLayer(
                layer,
                admission.at(layer),
                Ring(
                    zeros(heads, self.window, dim, dtype=spec.dtype),
                    zeros(heads, self.window, dim, dtype=spec.dtype),
                    zeros(heads, self.window, dtype=torch.uint8),
                ),
                zeros(heads, columns, dtype=torch.int32),
                zeros(heads, dtype=torch.int32),
            )
            for layer in range(spec.layers)
        ]
        self.arena = zeros(plan.blocks(longest), dtype=torch.int64)
        self.room = zeros(dtype=torch.int32)  # pages of a row's arena now
        self.taken = zeros(dtype=torch.int32)
        self.refused = zeros(dtype=torch.int64)  # admitted tokens that found no page
        self.memory: Tensor | None = None
        self.pages: Pages | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything that lies outside vLLM's blocks."""
        own = [self.arena, self.room, self.taken, self.refused]
        for layer in self.layers:
            own += [*layer.ring, layer.table, layer.counts]
        return sum(tensor.untyped_storage().nbytes() for tensor in own)

    def count_refused(self) -> int:
        """Admitted tokens of heads, until now, that were left out since an arena was full."""
        return int(self.refused.sum())

    def bind(self, memory: Tensor) -> None:
        """Makes pages of vLLM's memory: int8, as many bytes as whole blocks hold."""
        self.memory = memory
        dim, dtype = self.spec.head_dim, self.spec.dtype
        part = PAGE * dim * dtype.itemsize
        memory = memory.view(-1)
        count = memory.numel() // (2 * part + PAGE * 4)
        k, v, meta = memory.split([count * part, count * part, count * PAGE * 4])
        none = torch.zeros(1, dtype=torch.int32, device=memory.device)
        self.pages = Pages(
            k.view(dtype).view(count, PAGE, dim),
            v.view(dtype).view(count, PAGE, dim),
            meta.view(torch.int32).view(count, PAGE),
            None,
            # One slab holds all pages.
            slabs=torch.zeros(1, 4, dtype=torch.int64, device=memory.device),
            slab_pages=1 << (count - 1).bit_length(),
            free=none,
            top=none,
            refs=none,
        )

    def begin(self, blocks: Tensor, lengths: Sequence[int], added: Sequence[int]) -> Step:
        """Opens a forward of requests of `lengths` tokens that get `added` more each.

        `blocks` `[B, n]` are their block tables. A request without tokens starts its row anew.
        """
        device = self.arena.device
        rows = blocks[:, 0].long()
        width = min(self.arena.shape[1], blocks.shape[1])
        self.arena[rows, :width] = blocks[:, :width].long()
        room = [self.plan.blocks(n + m) for n, m in zip(lengths, added, strict=True)]
        room_on = torch.tensor(room, dtype=torch.int32, device=device)
        self.room[rows] = room_on * self.plan.pages_per_block
        new = [place for place, n in enumerate(lengths) if n == 0]
        if new:
            fresh = rows[torch.tensor(new, device=device)]
            self.taken[fresh] = 0
            for layer in self.layers:
                layer.counts[fresh] = 0
        places = [place for place, n in enumerate(added) if n == 1]
        first = [sum(added[:place]) for place in range(len(added))]
        before = torch.zeros(len(self.taken), dtype=torch.int64, device=device)
        active = torch.zeros(len(self.taken), dtype=torch.bool, device=device)
        decoding = rows[torch.tensor(places, dtype=torch.int64, device=device)]
        before[decoding] = torch.tensor(
            [lengths[place] for place in places], dtype=torch.int64, device=device
        )
        active[decoding] = True
        ids = rows.tolist() if len(places) < len(added) else []
        return Step(
            tokens=sum(added),
            decoded=torch.tensor([first[p] for p in places], dtype=torch.int64, device=device),
            rows=decoding,
            lengths=before,
            active=active,
            prompts=tuple(
                Prompt(ids[place], first[place], self._segments(lengths[place], n))
                for place, n in enumerate(added)
                if n > 1
            ),
        )

    def _segments(self, start: int, added: int) -> Segments:
        numbers = (0, added), (0, min(start, self.window) + added), (start,)
        device = self.arena.device
        on = [torch.tensor(n, dtype=torch.int32, device=device) for n in numbers]
        return Segments(*numbers, *on)

    def attend(
        self, step: Step, index: int, query: Tensor, key: Tensor, value: Tensor,
        key_pre: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """Attention of one layer's new tokens `[T, H, D]`, written to `out` `[T, Hq, D]`."""
        layer = self.layers[index]
        if len(step.decoded):
            at = step.decoded
            pre = None if key_pre is None else key_pre[at]
            out[at] = self._decode(layer, step, query[at], key[at], value[at], pre)
        for prompt in step.prompts:
            part = slice(prompt.first, prompt.first + prompt.seg.cu_q[1])
            pre = None if key_pre is None else key_pre[part]
            out[part] = self._prompt(layer, prompt, query[part], key[part], value[part], pre)

    def _flags(
        self, layer: RowLayer, key: Tensor, value: Tensor, key_pre: Tensor | None,
        positions: Tensor, cu: Tensor,
    ) -> Tensor:  # fmt: skip
        """Bits of new tokens, uint8 `[Hkv, T]`, of keys and values `[Hkv, T, D]`."""
        if layer.admission.neutral:
            return torch.full(key.shape[:2], ADMITTED, dtype=torch.uint8, device=key.device)
        write = Write(
            key, value, positions, cu, layer.index, self.spec.head_ids, key_pre=key_pre
        )  # fmt: skip
        return layer.admission.admit(write).to(torch.uint8) * ADMITTED

    def _grant(self, rows: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Pages that heads are given of `fresh` `[n, Hkv]` that they want, and the first's number.

        Heads are served in order while the arena of their row has room.
        """
        wanted = fresh.cumsum(1) - fresh
        left = (self.room - self.taken)[rows, None]
        granted = torch.minimum((left - wanted).clamp(min=0), fresh)
        number = self.taken[rows, None] + granted.cumsum(1) - granted
        self.taken.index_add_(0, rows, granted.sum(1, dtype=torch.int32))
        return granted, number

    def _page(self, rows: Tensor, number: Tensor) -> Tensor:
        """Page ids of an arena's pages by number, both `[n, ...]`."""
        each = self.plan.pages_per_block
        block = torch.div(number, each, rounding_mode="floor").long()
        block = block.clamp(max=self.arena.shape[1] - 1)  # of pages that are not granted
        return (self.arena[rows].gather(1, block.flatten(1)).view_as(block) * each) + number % each

    def _decode(
        self, layer: RowLayer, step: Step, query: Tensor, key: Tensor, value: Tensor,
        key_pre: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention `[n, Hq, D]` of a token of each of some rows; nothing waits for the host."""
        rows, before = step.rows, step.lengths[step.rows]
        pre = None if key_pre is None else key_pre.transpose(0, 1)
        flags = self._flags(
            layer, key.transpose(0, 1), value.transpose(0, 1), pre, before,
            torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device),
        )  # fmt: skip
        slot = layer.ring.slot(before)
        k, v, f = (ring[rows, :, slot] for ring in layer.ring)  # what leaves the window
        wanted = ((f & ADMITTED) > 0) & (before >= self.window)[:, None]
        counts = layer.counts[rows]
        full = counts % PAGE == 0
        granted, number = self._grant(rows, (wanted & full).int())
        stored = wanted & (~full | (granted > 0))
        heads = torch.arange(counts.shape[1], device=rows.device)
        column = torch.div(counts, PAGE, rounding_mode="floor").long()
        column = column.clamp(max=layer.table.shape[2] - 1)
        entry = layer.table[rows[:, None], heads, column]
        page = torch.where(granted > 0, self._page(rows, number).int(), entry)
        layer.table[rows[:, None], heads, column] = page
        assert self.pages is not None
        at = (before - self.window).int().expand(len(heads), -1).contiguous()
        dest = torch.where(stored, counts, -1).T.contiguous()
        self.ops.append(
            self.pages, layer.table, k.transpose(0, 1), v.transpose(0, 1), at, dest, rows.int()
        )
        layer.counts[rows] = counts + stored
        self.refused.index_add_(0, rows, (wanted & ~stored).sum(1))
        for ring, new in zip(layer.ring, (key, value, flags.T), strict=True):
            ring[rows, :, slot] = new
        asked = query.new_zeros(len(step.active), *query.shape[1:])
        asked[rows] = query
        held = Heads(layer.table, layer.counts * step.active[:, None])
        out = self.ops.paged_decode(
            asked, self.pages, held, layer.ring, step.lengths, step.active, self.window,
            self.spec.softmax_scale,
        )  # fmt: skip
        return out[rows]

    def _prompt(
        self, layer: RowLayer, prompt: Prompt, query: Tensor, key: Tensor, value: Tensor,
        key_pre: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention `[n, Hq, D]` of a part of one row's prompt."""
        seg, row = prompt.seg, slice(prompt.row, prompt.row + 1)
        key, value, query = (x.transpose(0, 1) for x in (key, value, query))
        positions = torch.arange(seg.start[0], seg.start[0] + seg.cu_q[1], device=key.device)
        pre = None if key_pre is None else key_pre.transpose(0, 1)
        flags = self._flags(layer, key, value, pre, positions, seg.cu_q_dev)
        ring = Ring(*(x[row] for x in layer.ring))
        (k, v, f), _ = self.ops.advance_ring(ring, key, value, flags, seg, undo=False)
        leaving = seg.cu_k[1] - self.window
        if leaving > 0:
            first = seg.start[0] + seg.cu_q[1] - seg.cu_k[1]  # position of the first recent token
            f = self._store(layer, prompt.row, k[:, :leaving], v[:, :leaving], f, first)
        assert self.pages is not None
        held = Heads(layer.table[row], layer.counts[row])
        return self.ops.prefill_attention(
            query, k, v, f, seg, self.pages, held, self.window, self.spec.softmax_scale
        ).transpose(0, 1)

    def _store(
        self, layer: RowLayer, row: int, key: Tensor, value: Tensor, flags: Tensor, first: int
    ) -> Tensor:
        """Stores those of a row's leaving tokens `[Hkv, n, D]` that are admitted.

        Returns the flags `[Hkv, Tk]` without the bit of those that found no page.
        """
        assert self.pages is not None
        count, device = key.shape[1], key.device
        wanted = (flags[:, :count] & ADMITTED) > 0
        before = layer.counts[row]
        running = before[:, None] + wanted.cumsum(1, dtype=torch.int32)  # [Hkv, n]
        have, rows = pages_of(before, PAGE), torch.tensor([row], device=device)
        granted, number = self._grant(rows, (pages_of(running[:, -1], PAGE) - have)[None])
        limit = (have + granted[0]) * PAGE
        column = torch.arange(layer.table.shape[2], device=device)
        rank = column - have[:, None]
        fresh = (rank >= 0) & (rank < granted[0][:, None])
        page = self._page(rows, (number[0][:, None] + rank.clamp(min=0))[None])[0]
        layer.table[row] = torch.where(fresh, page.int(), layer.table[row])
        stored = wanted & (running <= limit[:, None])
        dest = torch.where(stored, running - 1, -1)
        at = torch.arange(first, first + count, dtype=torch.int32, device=device)
        self.ops.append(
            self.pages, layer.table, key, value, at.expand(len(before), -1).contiguous(),
            dest.contiguous(), torch.full((count,), row, dtype=torch.int32, device=device),
        )  # fmt: skip
        layer.counts[row] = torch.minimum(running[:, -1], limit)
        lost = wanted & ~stored
        self.refused[row] += lost.sum()
        kept = flags.clone()
        kept[:, :count] &= ~(lost.to(torch.uint8) * ADMITTED)
        return kept
