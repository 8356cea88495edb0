"""What a cache holds, read back from its buffers."""

from __future__ import annotations

import torch

from kvpolicy.calls.settle import seen
from kvpolicy.ops import ADMITTED, MARKED, POSITION_MASK
from kvpolicy.store.moments import query_stats
from tests.support.contract.snapshot import snapshot


def contents(state, layer, row):
    """What each head of a sequence holds: page contents with summaries, visible ring, queries."""
    store, size = state.layers[layer], state.spec.page_size
    length = state.lengths[row]
    near = torch.arange(max(length - store.window, 0), length) % store.ring.slots
    heads = []
    for h in range(state.spec.kv_heads):
        count = int(store.counts[row, h])
        ids = store.table[row, h, : -(-count // size)]
        k, v, meta = state.ops.read_pages(store.pool.pages, ids)
        flags, meta = store.ring.flags[row, h, near], meta.flatten()[:count]
        head = {
            "at": meta & POSITION_MASK,
            "mark": meta > POSITION_MASK,
            "k": k.flatten(0, 1)[:count],
            "v": v.flatten(0, 1)[:count],
            "ring_k": store.ring.k[row, h, near],
            "ring_v": store.ring.v[row, h, near],
            "admitted": (flags & ADMITTED) > 0,
            "marked": (flags & MARKED) > 0,
        }
        if store.pool.summary is not None and not store.selection.neutral and not store.slides:
            head["summary"] = state.ops.read_summary(store.pool.pages, ids)
        if store.query_ring is not None:
            # Per KV head, so that a shard's can be compared with the whole's.
            _, *moments = query_stats(state, store)
            head |= {
                name: x[row].unflatten(0, (len(store.counts[row]), -1))[h]
                for name, x in zip(("query_mean", "query_covariance"), moments, strict=True)
            }
        if store.queries is not None:
            last = torch.arange(max(length - store.eviction.queries, 0), length)
            head["queries"] = store.queries[row][:, last % store.queries.shape[2]]
        heads.append(head)
    return heads


class Held:
    """One layer of a snapshot, all heads at once, to be compared with oracles."""

    def __init__(self, state, layer):
        store, size = state.layers[layer], state.spec.page_size
        self.state, self.layer = state, layer
        self.counts, self.evicted = store.counts.tolist(), store.evicted.tolist()
        most = -(-max(max(row) for row in self.counts) // size)
        k, v, meta = state.ops.read_pages(store.pool.pages, store.table[:, :, :most])
        self.k, self.v, self.meta = (x.flatten(2, 3) for x in (k, v, meta))
        self.ring = store.ring
        self.numbers = None if store.numbers is None else seen(state, store)

    def check(self, row, oracle):
        pages = [oracle.pages(h) for h in range(oracle.heads)]
        assert self.counts[row] == [len(at) for at in pages], (self.layer, row)
        assert self.evicted[row] == oracle.evicted
        heads = torch.tensor([h for h, at in enumerate(pages) for _ in at], dtype=torch.long)
        slot = torch.tensor([i for at in pages for i in range(len(at))], dtype=torch.long)
        at = torch.tensor(sum(pages, []), dtype=torch.long)
        meta = self.meta[row][heads, slot]
        assert torch.equal(meta & POSITION_MASK, at.int()), (self.layer, row)
        assert torch.equal(self.k[row][heads, slot], oracle.k[heads, at])
        assert torch.equal(self.v[row][heads, slot], oracle.v[heads, at])
        near = torch.arange(max(oracle.n - oracle.W, 0), oracle.n)
        ring_k, ring_v, flags = (x[row][:, near % x.shape[2]] for x in self.ring)
        assert torch.equal(ring_k, oracle.k[:, near]) and torch.equal(ring_v, oracle.v[:, near])
        if not oracle.slides:
            assert torch.equal((flags & ADMITTED) > 0, oracle.alive[:, near])
            if not oracle.eviction.neutral:
                assert torch.equal(meta > POSITION_MASK, oracle.mark[heads, at])
        if self.numbers is not None:
            wanted, held = oracle.numbers(), self.numbers.stored[row][heads, slot]
            recent = self.numbers.recent[row][:, near % self.ring.slots]
            close = {"atol": 1e-12 if held.dtype == torch.float64 else 1e-4, "rtol": 1e-4}
            torch.testing.assert_close(held.double(), wanted[heads, at], **close)
            torch.testing.assert_close(recent.double(), wanted[:, near], **close)
        h = oracle.n % oracle.heads
        assert self.state.kept(self.layer, row, h).tolist() == pages[h] + near.tolist()


class Digest:
    """Text that is equal to the letter, and numbers that are up to the order of their sums."""

    def __init__(self, text, numbers):
        self.text, self.numbers = text, numbers

    def __eq__(self, other):
        pairs = zip(self.numbers, other.numbers, strict=True)
        close = all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in pairs)
        return self.text == other.text and close


def numbers(state):
    """What an eviction would see of each token's number, by layer and sequence."""
    found = []
    for layer, row in ((x, b) for x in state.layers if x.numbers for b in range(state.batch)):
        there = torch.arange(int(layer.counts.max())) < layer.counts[row, :, None]
        near = torch.arange(max(state.lengths[row] - layer.window, 0), state.lengths[row])
        held = seen(state, layer)
        found.append(held.stored[row, :, : there.shape[1]].where(there, 0))
        found.append(held.recent[row][:, near % layer.ring.slots])
    return found


def digest(state):
    """Everything that decides what comes next; unused memory left out."""
    (state,) = snapshot([state])
    rows = range(state.batch)
    tensors = [
        [{n: t.tolist() for n, t in head.items()} for head in contents(state, layer, row)]
        for layer in range(state.spec.layers)
        for row in rows
    ]
    counters = [(x.counts.tolist(), x.evicted.tolist()) for x in state.layers]
    hosts = [
        (x.length, x.active, x.evicted_at, x.considered_at, x.prompt_open) for x in state.sequences
    ]
    text = repr((tensors, counters, state.devices.read(), hosts))
    return Digest(text, numbers(state))
