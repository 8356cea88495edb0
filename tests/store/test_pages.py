"""The page pool alone: taking, sharing, growing both ways, trimming, the limit."""

from __future__ import annotations

import gc
import types

import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, CapacityError
from kvpolicy.store.fork import select_rows
from kvpolicy.store.pool import SLAB_PAGES, PagePool
from kvpolicy.store.trimming import trim

SIZE, DIM = 4, 16


class Holder:
    """What a pool knows of a cache: a lease and a layer with a table."""

    def __init__(self, pool, table):
        self.table, self.lease = table, pool.lease()
        self.lease.layers.append(types.SimpleNamespace(table=table))

    def widen(self, table):
        self.table = self.lease.layers[0].table = table


def make(moving, summary=True):
    """A pool on the CPU, wherever the suite runs; pages are copied view by view."""

    def copy(pages, source, target):
        for pair in zip(source.tolist(), target.tolist(), strict=True):
            for old, new in zip(*(locate(pool, page) for page in pair), strict=True):
                new.copy_(old)

    pool = PagePool(
        page_size=SIZE,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
        summary=(2 * DIM, torch.float32) if summary else None,
        moving=moving,
        copy=copy,
    )
    return pool


@pytest.fixture(params=[True, False], ids=["moving", "appending"])
def pool(request):
    return make(request.param)


def locate(pool, page):
    """Views of a page's k, v, meta and summary, found as kernels do: through the slab table."""
    if pool.moving:
        return [store[page] for store in pool.extents[0]]
    views = []
    for column, first in enumerate(pool.extents[0]):
        start = int(pool.slabs[page // SLAB_PAGES, column]) * 16 * first.element_size()
        address = first.data_ptr() + start + page % SLAB_PAGES * first[0].nbytes
        owner = next(
            t[column]
            for t in pool.extents
            if 0 <= address - t[column].data_ptr() < t[column].nbytes
        )
        views.append(owner[(address - owner.data_ptr()) // first[0].nbytes])
    return views


def write(pool, ids):
    """Marks each page with its own number."""
    for page in ids.tolist():
        for view in locate(pool, page):
            view.fill_(page)


def read(pool, page):
    """The number that all four stores of a page agree on."""
    (number,) = {float(x) for view in locate(pool, page) for x in view.flatten()}
    return number


def free(pool):
    return pool.free[: pool.available].tolist()


def assert_counts(pool, held):
    assert sorted(free(pool) + list(held)) == list(range(1, pool.capacity))
    assert {p for p in range(pool.capacity) if pool.refs[p] > 0} == set(held)
    assert pool.used == len(held)


def test_take_gives_each_page_once(pool):
    first, second = pool.take(10), pool.take(20)
    ids = [*first.tolist(), *second.tolist()]
    assert len(set(ids)) == 30 and 0 not in ids
    assert first.dtype == torch.int32
    assert_counts(pool, ids)


def test_release_frees_the_last_holder_only(pool):
    ids = pool.take(3)
    pool.share(torch.cat([ids[:2], ids[:1], torch.zeros(2, dtype=torch.int32)]))
    assert pool.refs[ids.long()].tolist() == [3, 2, 1]
    pool.release(torch.cat([ids, torch.zeros(3, dtype=torch.int32)]))
    assert_counts(pool, ids[:2].tolist())
    pool.release(torch.stack([ids[0], ids[1], ids[0]]))
    assert_counts(pool, [])
    assert pool.refs[0] == 0


def test_growth_keeps_contents(pool):
    old = pool.take(SLAB_PAGES - 1)
    write(pool, old)
    where = [t.data_ptr() for t in pool.extents[0]]
    new = pool.take(3 * SLAB_PAGES)
    write(pool, new)
    every = torch.cat([old, new]).tolist()
    assert len(set(every)) == len(every) == 4 * SLAB_PAGES - 1
    assert [read(pool, page) for page in every] == every
    assert_counts(pool, every)
    if not pool.moving:
        assert [t.data_ptr() for t in pool.extents[0]] == where
        assert pool.generation > 0  # the table of slabs was too small


def test_growth_reserves_little(pool):
    while pool.used < 4000:
        pool.take(37)
        assert pool.available <= max(pool.used // 10, SLAB_PAGES)


@pytest.mark.parametrize("kept", [0, 1, SLAB_PAGES, 5 * SLAB_PAGES + 3])
def test_trim_moves_pages_and_gives_memory_back(pool, kept):
    for _ in range(8):  # several extents, so that appended memory can go in pieces
        pool.take(SLAB_PAGES)
    ids = (pool.refs > 0).nonzero()[:, 0].int()
    write(pool, ids)
    stay = ids[len(ids) - kept :]
    table = torch.zeros(1, kept + 1, dtype=torch.int32)
    table[0, :kept] = stay
    pool.share(stay)
    holder, other = Holder(pool, table), Holder(pool, table.clone())
    pool.release(ids[: len(ids) - kept])
    before = pool.capacity
    trim(pool)
    assert pool.capacity < before or kept > 5 * SLAB_PAGES
    assert pool.available <= max(kept // 10, SLAB_PAGES)
    assert all(t.nbytes == t.untyped_storage().nbytes() for t in pool.extents[0])
    assert sum(e[0].shape[0] for e in pool.extents) == pool.capacity
    assert torch.equal(holder.table, other.table)
    assert holder.table[0, kept] == 0
    assert [read(pool, page) for page in holder.table[0, :kept].tolist()] == stay.tolist()
    assert_counts(pool, holder.table[0, :kept].tolist())
    assert all(pool.refs[page] == 2 for page in holder.table[0, :kept].tolist())


def test_trim_leaves_reserved_pages(pool):
    holder = Holder(pool, torch.zeros(1, 1, dtype=torch.int32))
    pool.reserve(holder.lease, 150)
    trim(pool)
    assert pool.available >= 150
    holder.lease.reserved = 0
    trim(pool)
    assert pool.capacity == SLAB_PAGES


def test_grown_again_after_trim(pool):
    holder = Holder(pool, pool.take(5 * SLAB_PAGES)[None])
    pool.release(holder.table[0, 3:])
    holder.widen(holder.table[:, :3].clone())
    write(pool, holder.table[0])
    numbers = holder.table[0].tolist()
    trim(pool)
    new = pool.take(4 * SLAB_PAGES)
    write(pool, new)
    assert [read(pool, page) for page in holder.table[0].tolist()] == numbers
    assert [read(pool, page) for page in new.tolist()] == new.tolist()
    assert_counts(pool, [*holder.table[0].tolist(), *new.tolist()])


def test_reservations_add_up(pool):
    one, two = (Holder(pool, torch.zeros(1, 1, dtype=torch.int32)) for _ in range(2))
    pool.reserve(one.lease, 40)
    pool.reserve(two.lease, 50)
    assert pool.available >= 90
    pool.take(30)  # a third party
    assert pool.available >= 90
    pool.reserve(one.lease, 10)  # replaces the 40
    assert pool.reserved == 60
    del two
    gc.collect()
    assert pool.reserved == 10


def snapshot(pool):
    pages = {page: read(pool, page) for page in range(1, pool.capacity) if pool.refs[page] > 0}
    return pool.capacity, free(pool), pool.refs.tolist(), pool.reserved, pages


def test_limit_raises_and_changes_nothing(pool):
    pool.limit = 2 * SLAB_PAGES + 5
    most = pool.limit if pool.moving else 2 * SLAB_PAGES - 1  # whole slabs are appended
    write(pool, pool.take(most - 10))
    holder = Holder(pool, torch.zeros(1, 1, dtype=torch.int32))
    pool.reserve(holder.lease, 4)
    before = snapshot(pool)
    for fails in (
        lambda: pool.take(7),
        lambda: pool.provide(7),
        lambda: pool.reserve(holder.lease, 11),
    ):
        with pytest.raises(CapacityError, match=f"at most {pool.limit}"):
            fails()
        assert snapshot(pool) == before
    assert pool.take(6).numel() == 6
    pool.reserve(holder.lease, 4)
    assert pool.used + pool.available == most == pool.capacity - 1


def test_a_cache_may_go_while_pages_move(pool, monkeypatch):
    """A collector may run inside `trim`; the pages of what it collects are freed all the same."""
    pool.take(5 * SLAB_PAGES)
    ids = (pool.refs > 0).nonzero()[:, 0].int()
    gone, stays = (Holder(pool, ids[None, -n:][:, :10].clone()) for n in (10, 20))
    pool.release(ids[:-20])
    move = pool.copy

    def collect(pages, source, target):
        move(pages, source, target)
        gone.lease.layers.clear()
        pool.orphans.append(gone.table)

    monkeypatch.setattr(pool, "copy", collect)
    trim(pool)
    assert_counts(pool, stays.table.flatten().tolist())


def test_forks_that_nobody_holds_leave_nothing():
    """Their pages and tables go with the next fork."""
    pipeline = CachePipeline(window=4, backend="reference")
    state = pipeline.init(CacheSpec(layers=1, heads=1, kv_heads=1, head_dim=2, page_size=4))
    x = torch.ones(1, 21, 2)
    pipeline.begin(state, [21], "prompt")
    pipeline.attend(state, 0, x, x, x)
    pipeline.commit(state)
    held = state.devices.pools[0]
    select_rows(state, [0])
    pages = held.used
    for _ in range(20):
        select_rows(state, [0])
        assert held.used == pages and len(held.leases) + len(held.orphans) <= 3


@pytest.mark.parametrize("slabs", [2, 8])
def test_a_presized_pool_grows_in_place(slabs):
    pool = make(False)
    pool.presize(slabs * SLAB_PAGES)
    made, lists = pool.generation, [x.data_ptr() for x in (pool.free, pool.refs, pool.slabs)]
    pool.take(slabs * SLAB_PAGES)
    assert pool.capacity >= slabs * SLAB_PAGES and pool.generation == made
    assert [x.data_ptr() for x in (pool.free, pool.refs, pool.slabs)] == lists


def test_a_limit_of_whole_slabs_but_one_page_is_used_up(pool):
    pool.limit = 2 * SLAB_PAGES - 1  # the null page does not count
    assert len(set(pool.take(2 * SLAB_PAGES - 1).tolist())) == 2 * SLAB_PAGES - 1
    with pytest.raises(CapacityError):
        pool.take(1)


def test_a_slab_that_goes_beyond_the_limit_by_a_page_is_not_appended():
    pool = make(False)
    pool.limit = 2 * SLAB_PAGES - 2
    pool.take(SLAB_PAGES - 1)
    with pytest.raises(CapacityError):
        pool.take(1)
