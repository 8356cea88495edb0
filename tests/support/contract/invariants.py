"""What holds for caches that share a pool after every step, read from the buffers alone."""

from __future__ import annotations

from collections import Counter

import torch

from tests.support.contract.snapshot import snapshot, tensors_of


def check_pool(states):
    """Every page is free or referenced, once for each table entry that names it.

    Returns the pages that several heads share.
    """
    pool = states[0].devices.pools[0]
    available = pool.available
    free = pool.free[:available].tolist()
    assert len(set(free)) == available and 0 not in free
    named = Counter()
    for state in states:
        for layer in state.layers:
            size, width = state.spec.page_size, layer.table.shape[2]
            held = -(-layer.counts // size)
            used = torch.arange(width, device=held.device) < held[..., None]
            assert (layer.table[used] > 0).all() and not layer.table[~used].any()
            assert not layer.slides or not used.any()
            named.update(layer.table[used].tolist())
            partial = layer.table.gather(
                2, (layer.counts // size).clamp(max=width - 1)[..., None].long()
            )
            partial = partial[..., 0][layer.counts % size > 0].long()
            assert (pool.refs[partial] == 1).all()
    refs = {page: n for page, n in enumerate(pool.refs.tolist()) if n}
    assert refs == named
    assert set(named) | set(free) == set(range(1, pool.capacity))
    assert not set(named) & set(free)
    return sum(n > 1 for n in named.values())


def check_summaries(state):
    """Every page's summary is that of the keys it holds."""
    size = state.spec.page_size
    for layer in state.layers:
        if layer.selection.neutral or layer.slides:
            continue
        column = torch.arange(layer.table.shape[2], device=layer.counts.device)
        held = (layer.counts[..., None] - size * column).clamp(0, size)
        ids, counts = layer.table[held > 0], held[held > 0]
        keys = state.ops.read_pages(layer.pool.pages, ids)[0]
        want = layer.selection.summarize(keys, column.new_tensor(range(size)) < counts[:, None])
        got = state.ops.read_summary(layer.pool.pages, ids)
        assert torch.equal(got[:, : want.shape[1]], want)


def reachable_bytes(state):
    """Bytes of every storage that a collector finds from `state`, policies' weights left out."""
    storages = (x.untyped_storage() for x in tensors_of(state))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def check_report(report, state, host):
    """The report's bytes are those of the storages, category by category.

    `host` is the snapshot of `state` that the report is of.
    """
    spec, pool = state.spec, host.devices.pools[0]
    assert report.total == reachable_bytes(state)
    item, wide = torch.tensor([], dtype=spec.dtype).element_size(), spec.head_dim
    assert report.pages == pool.used * 2 * spec.page_size * wide * item
    assert report.positions == pool.used * spec.page_size * 4
    width, dtype = pool.summary or (0, spec.dtype)
    assert report.summaries == pool.used * width * dtype.itemsize
    unused = pool.capacity - pool.used
    page = spec.page_size * (2 * wide * item + 4) + width * dtype.itemsize
    assert report.reserved == unused * page
    slots = [layer.window + spec.rollback for layer in state.layers]
    assert report.ring == sum(
        state.batch * spec.kv_heads * n * (2 * wide * item + 1) for n in slots
    )
    queries = [
        0
        if x.slides
        or not (x.eviction.queries or (x.eviction.accumulates and not x.eviction.replayed))
        else max(x.eviction.queries, 1) + spec.rollback
        for x in state.layers
    ]
    assert report.queries == sum(state.batch * spec.heads * n * wide * item for n in queries)
    numbered = [(x, n) for x, n in zip(host.layers, slots, strict=True) if x.numbers is not None]
    held = [x.numbers.stored.shape[2] + n for x, n in numbered]
    assert report.numbers == sum(state.batch * spec.kv_heads * n * max(item, 4) for n in held)
    for layer, _ in numbered:
        assert not layer.slides and layer.numbers.stored.shape[2] >= layer.counts.max()
    assert report.tokens == sum(state.lengths)


def check_states(pipeline, states):
    hosts = snapshot(states)
    check_pool(hosts)
    for state, host in zip(states, hosts, strict=True):
        check_summaries(host)
        check_report(pipeline.report(host), state, host)
