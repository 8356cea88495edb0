"""What a worker keeps of requests: rings, tables and counts of each row, and their arenas.

A row is a place for one running request. Its number is the id of the request's first block, which
the manager takes from a set of as many blocks as there are rows (`spec.py`); row 0, the id of
vLLM's null block, is a place for padding, where nothing is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...admission import Write
from ...backend import resolve
from ...ops import Arenas, Heads, Pages, Ring, load, pages_of
from ...pipeline import CachePipeline
from ...spec import CacheSpec
from .plan import PAGE, Plan
from .row_layer import KNOWN, RowLayer, look_ahead, tensors_of
from .step import Step, prompt_of, sent


class Rows:
    """The state of `rows` requests, for `layers` of one model, over memory that vLLM owns."""

    def __init__(
        self, spec: CacheSpec, pipeline: CachePipeline, plan: Plan, rows: int, longest: int
    ) -> None:
        self.spec, self.plan, self.window, self.longest = spec, plan, pipeline.window, longest
        backend = resolve(pipeline.backend, spec.device)
        self.ops = load(backend)
        admission = pipeline.admission.place(spec.device, spec.dtype, backend)
        selection, self.summarized = pipeline.selection, not pipeline.selection.neutral
        self.eviction = None if pipeline.eviction.neutral else pipeline.eviction
        total, heads, dim = rows + 1, spec.kv_heads, spec.head_dim
        columns = max(pages_of(max(longest - self.window, 0), PAGE), 1)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=spec.device)

        self.counts = zeros(spec.layers, total, heads, dtype=torch.int32)
        self.layers = [
            RowLayer(
                layer,
                admission.at(layer),
                selection.at(layer),
                Ring(
                    zeros(total, heads, self.window, dim, dtype=spec.dtype),
                    zeros(total, heads, self.window, dim, dtype=spec.dtype),
                    zeros(total, heads, self.window, dtype=torch.uint8),
                ),
                zeros(total, heads, columns, dtype=torch.int32),
                self.counts[layer],
                queries=zeros(total, spec.heads, pipeline.eviction.queries, dim, dtype=spec.dtype)
                if self.eviction
                else None,
            )
            for layer in range(spec.layers)
        ]
        if admission.by_position and spec.layers * heads * longest <= KNOWN:
            look_ahead(self.layers, spec, longest)
        most = plan.blocks(longest)
        self.arenas = Arenas(
            zeros(total, most, dtype=torch.int32),
            zeros(total, dtype=torch.int32),
            zeros(total, dtype=torch.int32),
            zeros(total, dtype=torch.int64),
            plan.pages_per_block,
        )
        if self.eviction:  # the last page is nobody's
            spare = zeros(total, most * plan.pages_per_block + 1, dtype=torch.int32)
            self.arenas = self.arenas._replace(spare=spare, spared=zeros(total, dtype=torch.int32))
        self.ends: dict[int, int] = {}  # tokens of the prompts of rows, where an eviction asks
        # Of the step: tokens of each row before it and whether it decodes; the decoded tokens' rows
        # and positions.
        self.lengths = zeros(total, dtype=torch.int64)
        self.active = zeros(total, dtype=torch.bool)
        self.batch = zeros(total, dtype=torch.int32)
        self.positions = zeros(total, dtype=torch.int64)
        self.present = self.batch[:0].long()  # rows of the step's requests
        self.begun = zeros(total, dtype=torch.int64)  # refused tokens when a row was taken
        self.starts = torch.arange(total + 1, dtype=torch.int32, device=spec.device)
        self.memory: Tensor | None = None
        self.pages: Pages

    @property
    def nbytes(self) -> int:
        """Bytes of everything that lies outside vLLM's blocks, for each row and for padding."""
        own: list[Tensor | None] = [*self.arenas[:4], self.arenas.spare, self.arenas.spared]
        own += [self.lengths, self.active, self.batch, self.positions, self.begun, self.counts]
        for layer in self.layers:
            own += [*layer.ring, layer.table, layer.queries]
        return sum(tensor.untyped_storage().nbytes() for tensor in own if tensor is not None)

    @property
    def token_bytes(self) -> int:
        """Bytes of a head's token in a block: key, value, position and its part of a summary."""
        both = 2 * self.spec.head_dim * self.spec.dtype.itemsize
        return both + 4 + (both // PAGE if self.summarized else 0)

    def lasting(self) -> list[Tensor]:
        """What must be as it was when all requests have ended: constants, policies, counters.

        Everything else is written before it is read, whatever stands there.
        """
        found = [self.starts, self.arenas.refused]
        for layer in self.layers:
            found += [] if layer.known is None else [layer.known]
            found += [*tensors_of(layer.admission), *tensors_of(layer.selection)]
        return list({id(tensor): tensor for tensor in found}.values())

    def count_refused(self) -> int:
        """Admitted tokens of heads, until now, that were left out since an arena was full."""
        return int(self.arenas.refused.sum())

    def full(self) -> set[int]:
        """Rows of this step's requests at whose arena's end tokens were left out."""
        rows = self.present
        lost = (self.arenas.refused - self.begun)[rows] > 0
        return set(torch.where(lost, rows, 0).tolist()) - {0}

    def bind(self, memory: Tensor) -> None:
        """Makes pages of vLLM's memory: int8, as many bytes as whole blocks hold."""
        self.memory = memory
        dim, dtype = self.spec.head_dim, self.spec.dtype
        part = PAGE * dim * dtype.itemsize
        memory = memory.view(-1)
        count = memory.numel() // (PAGE * self.token_bytes)
        extra = count * (self.token_bytes - 4) * PAGE - 2 * count * part
        k, v, meta, summary = memory.split([count * part, count * part, count * PAGE * 4, extra])
        none = torch.zeros(1, dtype=torch.int32, device=memory.device)
        self.pages = Pages(
            k.view(dtype).view(count, PAGE, dim),
            v.view(dtype).view(count, PAGE, dim),
            meta.view(torch.int32).view(count, PAGE),
            summary.view(dtype).view(count, 2 * dim) if self.summarized else None,
            # One slab holds all pages.
            slabs=torch.zeros(1, 4, dtype=torch.int64, device=memory.device),
            slab_pages=1 << (count - 1).bit_length(),
            free=none,
            top=none,
            refs=none,
        )

    def scratch(self, tokens: int) -> int:
        """Bytes that reading `tokens` of the longest prompt takes in a layer at most, about.

        Its stored tokens are gathered, with room for all of the last part, and queries and outputs
        are copied up to four times.
        """
        spec = self.spec
        stored = self.plan.pages(self.longest) * PAGE // spec.layers + tokens * spec.kv_heads
        both = 2 * spec.head_dim * spec.dtype.itemsize
        return stored * (both + 4) + 2 * tokens * spec.heads * both

    def begin(self, blocks: Tensor, lengths: Sequence[int], added: Sequence[int]) -> Step:
        """Opens a forward of requests of `lengths` tokens that get `added` more each.

        `blocks` `[B, n]` are their block tables. A request without tokens starts its row anew. The
        first requests that get one token decode; one without a token is padding.
        """
        count, device = len(added), self.spec.device
        rows = blocks[:, 0].long()
        rows = torch.where((rows > 0) & (rows < len(self.active)), rows, 0)
        width = min(self.arenas.blocks.shape[1], blocks.shape[1])
        decodes = next((place for place, n in enumerate(added) if n != 1), count)
        fresh = [at for at, n in enumerate(lengths) if n == 0 < added[at]]
        room = [self.plan.blocks(n + m) for n, m in zip(lengths, added, strict=True)]
        on = sent([lengths, [n * self.plan.pages_per_block for n in room], fresh], device)
        self.arenas.blocks[rows, :width] = blocks[:, :width].int()
        self.arenas.room[rows] = on[1, :count]
        if fresh:
            new = rows[on[2, : len(fresh)].long()]
            self.arenas.taken.index_fill_(0, new, 0)
            self.counts.index_fill_(1, new, 0)
            self.begun[new] = self.arenas.refused[new]
            if self.arenas.spared is not None:
                self.arenas.spared.index_fill_(0, new, 0)
        self.present = rows
        self.batch.zero_()
        self.batch[:decodes] = rows[:decodes]
        self.positions[:decodes] = on[0, :decodes]
        self.lengths[rows] = on[0, :count].long()
        self.active.zero_()
        self.active.index_fill_(0, rows[:decodes], True)
        self.active[0] = False
        if not any(n > 0 for n in added[decodes:]):
            return Step(decodes)
        ids, held = self._ask(rows, decodes)
        first = [sum(added[:place]) for place in range(count)]
        return Step(
            decodes,
            tuple(
                prompt_of(ids[at], first[at], lengths[at], added[at], self.window, held[at], device)
                for at in range(decodes, count)
                # vLLM's trials may be longer, or have no blocks.
                if ids[at] and 0 < added[at] <= self.longest - lengths[at]
            ),
        )

    def _ask(self, rows: Tensor, decodes: int) -> tuple[list[int], dict[int, list[list[int]]]]:
        """Row numbers of a batch, and what the heads `[L][Hkv]` hold of those that read prompts.

        The one time in a step that the host waits for the device.
        """
        layers, _, heads = self.counts.shape
        prompts = range(decodes, len(rows))
        counts = self.counts.index_select(1, rows[decodes:]).transpose(0, 1)
        told = torch.cat([rows, counts.flatten()]).tolist()
        ids, rest = told[: len(rows)], iter(told[len(rows) :])
        return ids, {
            at: [[next(rest) for _ in range(heads)] for _ in range(layers)] for at in prompts
        }

    def rehearse(self, decodes: int) -> Step:
        """A step for a graph to be captured with: so many tokens, none of them a row's."""
        self.batch.zero_()
        self.active.zero_()
        return Step(decodes)

    def decode(
        self, step: Step, index: int, query: Tensor, key: Tensor, value: Tensor,
        key_pre: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention `[n, Hq, D]` of one layer's decoded tokens `[n, H, D]`.

        Nothing waits for the device, so that it can be captured.
        """
        layer, n = self.layers[index], step.decodes
        rows = self.batch[:n]
        if layer.queries is not None:
            slot = self.positions[:n] % layer.queries.shape[2]
            layer.queries[rows.long(), :, slot] = query
        write = Write(
            key.transpose(0, 1), value.transpose(0, 1), self.positions[:n], self.starts[: n + 1],
            index, self.spec.head_ids,
            key_pre=None if key_pre is None else key_pre.transpose(0, 1),
        )  # fmt: skip
        flags, bits = layer.decide(write)
        heads = Heads(layer.table, layer.counts)
        self.ops.arena_write(
            self.pages, heads, layer.ring, self.arenas, key, value,
            None if flags is None else flags.T, rows, self.lengths, self.active, self.window,
            minmax=not layer.selection.neutral, bits=bits,
        )  # fmt: skip
        return self.ops.paged_decode(
            query, self.pages, heads, layer.ring, self.lengths, self.active, self.window,
            self.spec.softmax_scale, self._select(layer, query, rows), rows=rows,
        )  # fmt: skip

    def _select(self, layer: RowLayer, query: Tensor, rows: Tensor) -> Tensor | None:
        """Pages that decoding queries `[n, Hq, D]` read, None for all."""
        policy = layer.selection
        if policy.neutral:
            return None
        own = Heads(layer.table[rows.long()], layer.counts[rows.long()])
        budget = min(policy.pages(self.window, PAGE), layer.table.shape[2])
        return policy.select(self.ops, self.pages, own, query, budget)
