"""One decoding layer over ragged pages, with sets of buffers that a cache cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Pages, Ring
from .context import Bench, check
from .data import ragged, stored, tokens_of
from .timing import sets_for

HEADS, KV_HEADS = 32, 8


class Layer:
    """Buffer sets of one layer: tables over one pool, and a ring and a query for each set."""

    def __init__(self, bench: Bench, mean: int, page: int, quest: int = 0) -> None:
        self.heads, self.kv_heads = bench.pick(HEADS, 4), bench.pick(KV_HEADS, 2)
        self.dim, self.window = bench.pick(128, 32), bench.pick(256, 16)
        self.lengths = ragged(mean, self.kv_heads)
        self.bytes = 4 * self.dim * (sum(self.lengths) + self.kv_heads * self.window)
        if quest:  # summaries, and the pages that are read
            pages = sum(-(-n // page) for n in self.lengths)
            self.bytes = 4 * self.dim * (pages + self.kv_heads * quest)
        count = bench.pick(sets_for(self.bytes), 2)
        self.pool, self.tables = stored(
            bench, [self.lengths] * count, page, self.dim, summaries=bool(quest)
        )
        slots = self.window + 32
        shape = (1, self.kv_heads, slots, self.dim)
        flags = torch.zeros(shape[:3], dtype=torch.uint8, device=bench.device)
        self.rings = [Ring(bench.randn(*shape), bench.randn(*shape), flags) for _ in self.tables]
        self.queries = [bench.randn(1, self.heads, self.dim) for _ in self.tables]
        self.now = torch.tensor([2 * mean + self.window], device=bench.device)
        self.active = torch.ones(1, dtype=torch.bool, device=bench.device)

    @property
    def pages(self) -> Pages:
        return self.pool.pages

    def attend(self, index: int, selected: Tensor | None = None) -> Tensor:
        from ..kernels.paged_decode import paged_decode

        return paged_decode(
            self.queries[index], self.pages, self.tables[index], self.rings[index], self.now,
            self.active, self.window, self.dim**-0.5, selected,
        )  # fmt: skip

    def choose(self, index: int, budget: int) -> Tensor:
        from ..kernels.page_select import quest_select

        heads = self.tables[index]
        return quest_select(self.pages, heads, self.queries[index], budget, "max", 0, 1)

    def check(
        self, name: str, index: int, selected: Tensor | None = None, out: Tensor | None = None
    ) -> None:
        """Compares the shortest and the longest head of `out`, else of `attend`, with float64."""
        out = self.attend(index, selected) if out is None else out
        table, group = self.tables[index].table, self.heads // self.kv_heads
        page, slots = self.pool.page_size, self.window + 32
        back = (int(self.now) - torch.arange(slots, device=out.device)) % slots
        ring = [x[0] for x in self.rings[index][:2]]
        for head in (0, self.kv_heads - 1):
            used = -(-self.lengths[head] // page)
            k, v, _ = tokens_of(self.pool, table[0, head, :used], self.lengths[head])
            if selected is not None:
                chosen = selected[0, head][selected[0, head] >= 0].long()
                token = (chosen[:, None] * page + torch.arange(page, device=out.device)).flatten()
                token = token[token < self.lengths[head]]
                k, v = k[token], v[token]
            k, v = (
                torch.cat([x, r[head][back < self.window]]).double()
                for x, r in zip((k, v), ring, strict=True)
            )
            q = self.queries[index][0, head * group : (head + 1) * group].double()
            exact = (q @ k.T * self.dim**-0.5).softmax(-1) @ v
            check(f"{name} head {head}", out[0, head * group : (head + 1) * group], exact)
