"""A case for each op on stored tokens: small, awkward, equal to the reference."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch

from kvpolicy.kernels import attention_mass as mass
from kvpolicy.kernels import key_dots as dots
from kvpolicy.kernels import window_scores as scoring
from kvpolicy.ops import ADMITTED, MARKED, Arenas, Numbers, Pairs, Ring
from tests.support.kernels.gate import weights
from tests.support.kernels.mirror import Mirror, Pair, Size, agree, both, make_mirror, pair

CASES: dict[str, Callable[[Size], None]] = {}


def case(*ops: str) -> Callable[[Callable[[Size], None]], Callable[[Size], None]]:
    """Registers a function that calls the named ops."""

    def register(function: Callable[[Size], None]) -> Callable[[Size], None]:
        CASES.update(dict.fromkeys(ops, function))
        return function

    return register


def heads(size: Size, spare: int = 0) -> Mirror:
    """A long head, an empty one, one of whole pages; a page that is nearly full; and a fork."""
    page = size.page
    mirror = make_mirror(size, [[3 * page + 1, 0, 2 * page], [page - 1, 5, 4 * page]], spare)
    mirror.fork()
    return mirror


@case("append")
def _append(size: Size) -> None:
    mirror, tokens = make_mirror(size, [[3, 0], [0, size.page]], spare=8), 37
    unused = iter(mirror.pages.host.free[: mirror.pages.host.top].tolist())
    end = mirror.counts.clone()
    dest, rows = torch.full((2, tokens), -1, dtype=torch.int32), torch.arange(tokens).int() // 20
    for t in range(tokens):
        b = int(rows[t])
        for h in range(2):
            n = int(end[b, h])
            if (t + h) % 5 == 0:
                if n % size.page == 0:
                    mirror.table[b, h, n // size.page] = next(unused)
                dest[h, t], end[b, h] = n, n + 1
    key = size.randn(tokens, 2, size.dim, seed=3).transpose(0, 1)
    meta = torch.arange(2 * tokens).int().view(2, tokens)
    table = pair(mirror.table)
    both("append", mirror.pages, table, key, size.values(key), meta, dest, rows)
    agree(mirror.stored(table, end))


@case("decode_write")
def _decode_write(size: Size) -> None:
    for window, slots, extras in ((3, 3, False), (4, 7, True)):
        page = size.page
        mirror = make_mirror(size, [[2 * page, 0], [page - 1, 1]], spare=12)
        mirror.fork()  # of whole pages, so that nothing shared is written
        mirror.counts[2, 1] = 0
        batch, kv_heads = mirror.counts.shape
        shape = batch, kv_heads, slots
        rings = [pair(size.randn(*shape, d, seed=d)) for d in (size.dim, size.dim_v)]
        flags = torch.full((batch, kv_heads, slots), ADMITTED | MARKED, dtype=torch.uint8)
        heads = pair(mirror.heads)
        ring = pair(Ring(*rings, pair(flags)))
        lengths = torch.tensor([1, 2 * page + slots, 40])
        shape = (batch, kv_heads * size.group)
        seen = pair(torch.zeros(*shape, 5, size.dim, dtype=size.dtype))
        for step in range(3):
            active = torch.tensor([True, step != 1, True])
            new = size.randn(batch, kv_heads, size.dim, seed=4 + step)
            bits = torch.full((batch, kv_heads), step % 2, dtype=torch.uint8)
            query = size.randn(*shape, size.dim, seed=9 + step)
            both(
                "decode_write", mirror.pages, heads, ring, new, size.values(new),
                bits if extras else None, lengths, active, window, minmax=extras,
                bits=MARKED if extras else ADMITTED, query=query if extras else None,
                queries=seen if extras else None,
            )  # fmt: skip
            lengths = lengths + active
        table, counts = (Pair(*x) for x in zip(*heads, strict=True))
        for found in (counts, ring, seen):
            agree(found)
        agree(mirror.stored(table, counts.host))
        agree(Pair(mirror.pages.host.top, mirror.pages.device.top))


@case("arena_write")
def _arena_write(size: Size) -> None:
    for window, slots, each in ((3, 3, 1), (4, 7, 2)):
        page, minmax = size.page, each == 2
        mirror = make_mirror(size, [[2 * page, 0], [page - 1, 1], [0, 0]], spare=40)
        batch, kv_heads = mirror.counts.shape
        free = set(mirror.pages.host.free[: mirror.pages.host.top].tolist())
        whole = [n for n in range(40) if {n * each + i for i in range(each)} <= free]
        mirror.table = torch.cat([mirror.table, torch.zeros(3, 2, 4, dtype=torch.int32)], -1)
        blocks = torch.tensor(whole[:9]).int().view(3, 3)
        room, refused = torch.tensor([3 * each, 1, 0]).int(), torch.zeros(3, dtype=torch.int64)
        given = []
        if minmax:  # heads of the first sequence gave a page back
            given = [
                torch.tensor([[whole[9] * each], [0], [0]]).int(),
                torch.tensor([1, 0, 0]).int(),
            ]
        arenas = pair(Arenas(blocks, room, torch.zeros_like(room), refused, each, *given))
        shape = batch, kv_heads, slots
        rings = [pair(size.randn(*shape, d, seed=d)) for d in (size.dim, size.dim_v)]
        ring = pair(Ring(*rings, pair(torch.full(shape, ADMITTED, dtype=torch.uint8))))
        heads, lengths = pair(mirror.heads), torch.tensor([1, 2 * page + slots, 40])
        for step in range(4):
            active = torch.tensor([True, step != 1, True])
            rows = torch.tensor([2, 0, 1]).int()
            new = size.randn(3, kv_heads, size.dim, seed=4 + step)
            bits = torch.full((3, kv_heads), step % 2, dtype=torch.uint8)
            both(
                "arena_write", mirror.pages, heads, ring, arenas, new, size.values(new),
                bits if minmax else None, rows, lengths, active, window, minmax=minmax,
                bits=MARKED if minmax else ADMITTED,
            )  # fmt: skip
            lengths = lengths + active
        table, counts = (Pair(*x) for x in zip(*heads, strict=True))
        for found in (counts, ring, *(Pair(*x) for x in list(zip(*arenas, strict=True))[:4])):
            agree(found)
        agree(mirror.stored(table, counts.host))
        assert arenas.host.refused.tolist()[2] > 0 < int(arenas.host.taken[0])
        assert (whole[9] * each in table.host[0]) == minmax


@case("paged_decode")
def _paged_decode(size: Size) -> None:
    mirror = heads(size)
    batch, kv_heads = mirror.counts.shape
    lengths, active = torch.tensor([99, 200, 3]), torch.tensor([True, True, True])
    query = size.randn(batch, kv_heads * size.group, size.dim, seed=2)
    picked = torch.tensor([0, 2, -1, -1]).int().expand(batch, kv_heads, 4).contiguous()
    picked[:, 1], picked[0, 2] = -1, torch.tensor([-1, 1, -1, 0])
    each = picked.repeat_interleave(size.group, 1).contiguous()
    for selected, window, slots in ((None, 70, 81), (picked, 5, 5), (each, 3, 9), (None, 1, 1)):
        keys = size.randn(batch, kv_heads, slots, size.dim, seed=3)
        ring = Ring(keys, size.values(keys), torch.zeros(keys.shape[:3], dtype=torch.uint8))
        found = both(
            "paged_decode", query, mirror.pages, mirror.heads, ring, lengths, active, window,
            size.dim**-0.5, selected=selected,
        )  # fmt: skip
        agree(found, size.atol)
        if selected is each:
            order = torch.tensor([2, 0]).int()
            some = both(
                "paged_decode", query[[2, 0]], mirror.pages, mirror.heads, ring, lengths, active,
                window, size.dim**-0.5, selected=each[[2, 0]], rows=order,
            )  # fmt: skip
            agree(Pair(found.host[[2, 0]], some.device.cpu()), size.atol)
        active = torch.tensor([True, False, True])


@case("quest_select", "top_pages")
def _page_select(size: Size) -> None:
    mirror = heads(size)
    query = size.randn(3, 3 * size.group, size.dim, seed=2)
    for group, budget in (("max", 3), ("mean", 9), ("each", 2)):
        given = (mirror.pages, mirror.heads, query, budget, group, 1, 1)
        agree(both("quest_select", *given))
    for width, budget in ((7, 3), (300, 64), (20_000, 50)):  # more than a program holds at once
        counts = torch.tensor([[width * size.page, 0], [width * size.page // 2 - 3, 1]]).int()
        scores = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(width))
        scores[:, 1] = scores[:, 1].round()
        agree(both("top_pages", scores, counts, size.page, budget, 1, 2))


@case("read_tokens")
def _read_tokens(size: Size) -> None:
    mirror = heads(size)
    chance = torch.rand(3, 3, 37, generator=torch.Generator().manual_seed(3))
    source = (chance * mirror.counts[..., None]).int()
    source[chance < 0.2] = -1
    source[mirror.counts == 0] = -1
    agree(both("read_tokens", mirror.pages, mirror.table, source))


@case("move_kept")
def _move_kept(size: Size) -> None:
    mirror = make_mirror(size, [[150, 0, size.page], [3 * size.page + 1, 9, 5]], spare=60)
    mirror.fork()
    # The fork keeps its pages: the first sequence reads those and writes others.
    new, held = mirror.table.clone(), mirror.table[0] > 0
    new[0][held] = mirror.pages.host.free[: int(held.sum())]
    counts = mirror.counts.clone()
    counts[1, 1] = 0  # left alone
    counts[2] = 0
    lengths = counts.flatten()
    keep = torch.rand(int(lengths.sum()), generator=torch.Generator().manual_seed(5)) < 0.7
    starts = lengths.long().cumsum(0) - lengths
    tables = pair(mirror.table.flatten(0, 1)), pair(new.flatten(0, 1))
    both("move_kept", mirror.pages, *tables, keep, starts, lengths)
    ends = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    stay = torch.tensor([int(keep[at : at + n].sum()) for at, n in ends]).view_as(counts)
    stay[1, 1], stay[2] = mirror.counts[1, 1], mirror.counts[2]
    agree(mirror.stored(pair(new), stay))


@case("keep_best")
def _keep_best(size: Size) -> None:
    for shape, dtype in (((2, 3, 70), torch.float32), ((3, 5000), size.dtype)):
        scores = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        scores[1] = scores[1].round()  # many ties
        valid = torch.rand(shape, generator=torch.Generator().manual_seed(8)) < 0.8
        valid.view(-1, shape[-1])[0] = False
        amount = torch.arange(valid[..., 0].numel()).view(shape[:-1]) * shape[-1] // 5
        agree(both("keep_best", scores, valid, amount))


@case("read_pages", "read_meta", "read_summary", "write_summary", "copy_pages")
def _page_io(size: Size) -> None:
    # Whole pages are moved, so all of a page is written here.
    mirror = make_mirror(size, [[4 * size.page, 2 * size.page]], spare=5)
    held = mirror.table[mirror.table > 0]
    free = mirror.pages.host.free[:2]
    for ids in (held.view(2, 3), held[:1], mirror.table[0, :, 0]):
        agree(both("read_pages", mirror.pages, ids))
        agree(both("read_meta", mirror.pages, ids))
        agree(both("read_summary", mirror.pages, ids))
    both("copy_pages", mirror.pages, held[:2], free)
    agree(both("read_pages", mirror.pages, free))
    into = torch.tensor([int(held[4]), 0, int(free[1])])
    both("write_summary", mirror.pages, into, torch.arange(6.0 * size.dim).view(3, -1) / 8)
    agree(both("read_summary", mirror.pages, torch.cat([free, held])))


@case("write_minmax")
def _write_minmax(size: Size) -> None:
    mirror, page = heads(size), size.page
    held = mirror.table[mirror.table > 0]
    before = torch.tensor([[page + 1, 0, 2 * page], [0, 5, page], [3 * page, 0, page - 1]]).int()
    for most in (1, 4, 7):
        both("write_summary", mirror.pages, held, torch.zeros(len(held), 2 * size.dim))
        both("write_minmax", mirror.pages, mirror.heads, before, most)
        agree(both("read_summary", mirror.pages, held))


@case("window_scores", "window_masses")
def _window_scores(size: Size) -> None:
    mirror = make_mirror(size, [[size.prompt + 40, 0, 2 * size.page], [size.page - 1, 64, 5]])
    mirror.fork()
    batch, kv_heads = mirror.counts.shape
    for window, observed, group, normalize, pooling in (
        (5, 24, "mean", "visible", "avg"),  # some queries lie before stored tokens
        (5, 24, "max", "global", "max"),
        (40, 7, "max", "visible", "avg"),
        (40, 7, "mean", "global", "max"),
        (5, 24, "each", "visible", "avg"),
    ):
        lengths = mirror.counts.amax(1).long() + window
        keys = size.randn(batch, kv_heads, window + 3, size.dim, seed=2)
        ring = Ring(keys, keys, torch.zeros(keys.shape[:3], dtype=torch.uint8))
        queries = size.randn(batch, kv_heads * size.group, observed + 2, size.dim, seed=3)
        with mock.patch.object(scoring, "_SPLIT", 64):  # several, each of whole tiles
            found = both(
                "window_scores", mirror.pages, mirror.heads, ring, queries, lengths,
                 window, size.dim**-0.5, observation=observed, kernel=3,
                pooling=pooling, group=group, normalize=normalize,
            )  # fmt: skip
            masses = both(
                "window_masses", mirror.pages, mirror.heads, ring, queries, lengths, window,
                size.dim**-0.5, observation=observed, squared=window == 40,
            )  # fmt: skip
        agree(found, size.atol)
        agree(masses, 4 * size.atol)


@case("expected_logits")
def _expected_attention(size: Size) -> None:
    mirror = make_mirror(size, [[size.prompt + 40, 0, 2 * size.page], [size.page - 1, 64, 5]])
    mirror.fork()
    batch, kv_heads = mirror.counts.shape
    linear = size.randn(batch, kv_heads * size.group, size.dim, seed=2).float()
    queries = size.randn(batch, kv_heads * size.group, size.dim + 5, size.dim, seed=3).float()
    square = queries.mT @ queries / size.dim**1.5
    for c in (square, None):
        found = both("expected_logits", mirror.pages, mirror.heads, linear, c)
        agree(found, size.atol * float(found.host.abs().max()))


@case("projected_norms")
def _projected_norms(size: Size) -> None:
    mirror = make_mirror(size, [[size.prompt + 40, 0, 2 * size.page], [size.page - 1, 64, 5]])
    mirror.fork()
    heads_, dim = mirror.counts.shape[1] * size.group, size.dim_v
    weight = size.randn(150, heads_, dim, seed=2).permute(1, 2, 0)
    for w in (weight, weight.contiguous()[..., :130]):
        found = both("projected_norms", mirror.pages, mirror.heads, w)
        agree(found, size.atol * float(found.host.abs().max()))


@case("key_dots", "key_directions", "key_norms", "value_norms")
def _key_dots(size: Size) -> None:
    mirror = make_mirror(size, [[size.prompt + 40, 0, 2 * size.page], [size.page - 1, 64, 5]])
    mirror.fork()
    batch, kv_heads = mirror.counts.shape
    vectors = size.randn(batch, kv_heads * size.group, size.dim, seed=2).float()
    half = size.dim // 2 - 1
    sizes = size.randn(batch, kv_heads * size.group, half, seed=3).float()
    for more, unit in (((), True), ((sizes, Pairs(2, 1, half)), False), ((sizes, Pairs(0, 2, 1)),
        True)):  # fmt: skip
        found = both("key_dots", mirror.pages, mirror.heads, vectors, *more, unit=unit)
        agree(found, size.atol * float(found.host.abs().max()))
    with mock.patch.object(dots, "_SPLIT", 64):
        agree(both("key_directions", mirror.pages, mirror.heads), 1e-4)
    for op in ("key_norms", "value_norms"):
        agree(both(op, mirror.pages, mirror.heads), size.atol)


@case("lag_spreads")
def _lag_spreads(size: Size) -> None:
    mirror = make_mirror(size, [[size.prompt + 40, 0, 2 * size.page], [size.page - 1, 64, 5]])
    mirror.fork()
    batch, kv_heads = mirror.counts.shape
    for window, sinks, lag in ((40, 4, 16), (70, 0, 37)):
        lengths = mirror.counts.amax(1).long() + window - torch.tensor([0, 30, 5])
        keys = size.randn(batch, kv_heads, window + 3, size.dim, seed=2)
        ring = Ring(keys, size.values(keys), torch.zeros(keys.shape[:3], dtype=torch.uint8))
        for values in (False, True):
            found = both(
                "lag_spreads", mirror.pages, mirror.heads, ring, lengths, window, sinks=sinks,
                lag=lag, values=values,
            )  # fmt: skip
            agree(found, size.atol)


@case("redundancy_scores")
def _redundancy_scores(size: Size) -> None:
    mirror = make_mirror(size, [[size.prompt + 40, 0, 2 * size.page], [size.page - 1, 64, 5]])
    mirror.fork()
    batch, kv_heads = mirror.counts.shape
    window = 40
    lengths = mirror.counts.amax(1).long() + window - torch.tensor([0, 30, 5])
    keys = size.randn(batch, kv_heads, window + 3, size.dim, seed=2)
    queries = size.randn(batch, kv_heads * size.group, window + 1, size.dim, seed=3)
    ring = Ring(keys, size.values(keys), torch.zeros(keys.shape[:3], dtype=torch.uint8))
    for group, softcap in (("max", None), ("mean", 20.0)):
        # No cosine of random keys of so many channels is near the threshold.
        agree(
            both(
                "redundancy_scores", mirror.pages, mirror.heads, ring, queries, lengths, window,
                size.dim**-0.5, observation=9, kernel=5, mix=0.5, threshold=0.97, group=group,
                softcap=softcap,
            ),
            size.atol,
        )  # fmt: skip


@case("last_similar")
def _last_similar(size: Size) -> None:
    width = size.prompt + 30
    # A few directions, so that many keys have one that resembles them and some have none.
    axes = torch.nn.functional.normalize(size.randn(9, size.dim, seed=5).float(), dim=-1)
    rng = torch.Generator().manual_seed(6)
    keys = axes[torch.randint(9, (4, width), generator=rng)]
    keys[:, ::7] = torch.nn.functional.normalize(
        size.randn(4, len(range(0, width, 7)), size.dim, seed=7).float(), dim=-1
    )
    lengths = torch.tensor([width, 0, 1, width // 2])
    found = both("last_similar", keys.to(size.dtype), lengths, 0.9)
    for side in found:
        side.masked_fill_(
            torch.arange(width, device=side.device) >= lengths.to(side.device)[:, None], -1
        )
    agree(found)
    assert (found.host[0] >= 0).any() and (found.host[0] < 0).any()


@case("attention_mass")
def _attention_mass(size: Size) -> None:
    page = size.page
    for number, (window, spare, most, first, last, modes, chunk) in enumerate(
        (
            (5, 4, 1, (30, 7, 9), (31, 7, 10), ("sum", "mean"), None),  # one row is not active
            (8, 0, 3, (-2, 4, 7), (1, 6, 10), ("max", "sum"), None),
            (7, 3, 4, (31, 5, 30), (35, 9, 31), ("sum", "max"), 11),
            (6, 40, 35, (0, 0, 1), (35, 10, 36), ("max", "mean"), None),
        )
    ):
        lengths = torch.tensor([36, 10, 36]) + page
        first, last = torch.tensor(first) + page, torch.tensor(last) + page
        slots = window + spare
        # Heads hold what left the window and was admitted: every token, every third, none.
        row = [[int(n) - window, 0, 0] for n in lengths[:2]]
        mirror = make_mirror(size, [[a, *b] for (a, *b) in row])
        for b, (count, third, _) in enumerate(row):
            mirror.counts[b, 1] = third
            assert mirror.counts[b, 0] == count
        mirror.fork()
        batch, kv_heads = mirror.counts.shape
        keys = size.randn(batch, kv_heads, slots, size.dim, seed=number)
        flags = torch.zeros(batch, kv_heads, slots, dtype=torch.uint8)
        flags[:, 0] = ADMITTED
        flags[:, 2, ::2] = MARKED
        ring = pair(Ring(keys, keys, flags))
        query = size.randn(batch, kv_heads * size.group, most + 2, size.dim, seed=9)
        width = int(mirror.counts.max()) + 3
        numbers = pair(
            Numbers(torch.rand(batch, kv_heads, width), torch.rand(batch, kv_heads, slots))
        )
        with mock.patch.object(mass, "_SPLIT", 64), mock.patch.object(mass, "_FEW", 4):
            both(
                "attention_mass", numbers, mirror.pages, mirror.heads, ring, query, lengths, first,
                last, window, size.dim**-0.5, most=most, accumulates=modes[0], group=modes[1],
                chunk=chunk, softcap=9.0 if number == 1 else None,
                among=(2, page, page + 20, page + 30) if number > 1 else None,
                sinks=size.randn(kv_heads * size.group, seed=3) if number % 2 else None,
            )  # fmt: skip
        agree(numbers, size.atol)


@case("write_number")
def _write_number(size: Size) -> None:
    window, slots, kv_heads = 4, 6, 3
    counts = torch.tensor([[7, 0, 3]] * 3, dtype=torch.int32)
    flags = torch.zeros(3, kv_heads, slots, dtype=torch.uint8)
    flags[:, :2] = ADMITTED | MARKED
    numbers = pair(Numbers(torch.rand(3, kv_heads, 8), torch.rand(3, kv_heads, slots)))
    for step, lengths in enumerate((torch.tensor([2, 20, 33]), torch.tensor([4, 21, 34]))):
        active = torch.tensor([True, step == 0, True])
        given = torch.rand(kv_heads, 3).T if step else None
        both("write_number", numbers, counts, flags, given, lengths, active, window)
    agree(numbers)


@case("write_gate")
def _write_gate(size: Size) -> None:
    parts = [x.cpu() for x in weights(3, size.dim, 100, size.dtype)]
    for tokens in (1, 131):
        pre = size.randn(tokens, 3, size.dim, seed=7).transpose(0, 1)
        key = size.randn(3, tokens, size.dim, seed=8)
        scores = both("write_gate", pre, key, *parts)
        agree(scores, size.atol)
        agree(both("write_gate", pre, key, *parts, silu=True), size.atol)
        limit = float(scores.device[1, 0])
        for inclusive in (False, True):
            found = both("write_gate", pre, key, *parts, limit, inclusive).device.cpu()
            assert torch.equal(found, scores.device.cpu() > limit) or inclusive
            assert bool(found[1, 0]) is inclusive
