"""A case for each op of a prompt call: chunks, whole prompts, empty ones and single tokens."""

from __future__ import annotations

from unittest import mock

import attrs
import torch
from torch.nn.attention import SDPBackend

from kvpolicy.kernels import antidiagonal, prompt_write
from kvpolicy.kernels import dense_prefill as dense
from kvpolicy.kernels import selected_prefill as selected
from kvpolicy.kernels import sparse_prefill as sparse
from kvpolicy.kernels.prefill_gather import Rectangles, Tile
from kvpolicy.ops import Heads, Ring, Segments, TileReads, tile_spans
from tests.support.kernels.dense import Dense
from tests.support.kernels.mirror import Mirror, Pair, Size, agree, both, make_mirror, pair
from tests.support.kernels.op_cases import case
from tests.support.kernels.pool import CUDA
from tests.support.kernels.prefill import make_segments


def segments_of(starts: list[int], queries: list[int], keys: list[int]) -> Segments:
    """`make_segments` on the host."""
    found = make_segments(starts, queries, keys)
    return Segments(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in found))


@case("advance_ring")
def _advance_ring(size: Size) -> None:
    slots = 37
    dims = (size.dim, size.dim_v)
    for undo, starts, new, old in (
        (False, [0, 0, 0], [size.prompt, 0, 5], [0, 0, 0]),
        (True, [size.prompt, 40, 0, 9], [3, 0, size.prompt - 7, 60], [30, 0, 0, 9]),
        (True, [500], [1], [37]),
    ):
        segments = segments_of(starts, new, [a + b for a, b in zip(old, new, strict=True)])
        held = len(starts), 2, slots
        rings = [pair(size.randn(*held, d, seed=d)) for d in dims]
        noise = torch.Generator().manual_seed(4)
        ring = pair(Ring(*rings, pair(torch.randint(4, held, generator=noise).byte())))
        key, value = (size.randn(sum(new), 2, d, seed=9).transpose(0, 1) for d in dims)
        flags = torch.randint(4, (2, sum(new)), generator=noise).byte()
        recent, before = zip(
            *both("advance_ring", ring, key, value, flags, segments, undo=undo), strict=True
        )
        agree(Pair(*recent))
        agree(ring)
        if undo:
            agree(Pair(*before))
        assert (before[0] is None) is not undo


@case("count_leaving", "write_leaving")
def _prompt_write(size: Size) -> None:
    window, starts, new, old = 5, [5, 40, 9], [size.prompt, 0, 1], [5, 0, 5]
    mirror = make_mirror(size, [[3, 0], [5, 2], [0, size.page]], spare=2 * size.prompt // 4 + 8)
    segments = segments_of(starts, new, [a + b for a, b in zip(old, new, strict=True)])
    flags = torch.randint(4, (2, segments.cu_k[-1]), generator=torch.Generator().manual_seed(1))
    flags = flags.byte()
    given = (mirror.counts, segments, window)
    with mock.patch.object(prompt_write, "_FEW", 0):  # counted apart
        apart = both("count_leaving", flags, *given, size.page)
    for side in list(zip(*apart, strict=True))[:2]:
        agree(Pair(*side))
    after, fresh, ranks = (
        Pair(*x) for x in zip(*both("count_leaving", flags, *given, size.page), strict=True)
    )
    agree(after)
    agree(fresh)
    pages, table = mirror.pages, pair(mirror.table)
    key = size.randn(segments.cu_k[-1], 2, size.dim, seed=3).transpose(0, 1)
    counts = pair(mirror.counts)
    written = (key, size.values(key), flags, segments, window, after, fresh, ranks)
    heads = Pair(*(Heads(*side) for side in zip(table, counts, strict=True)))
    both("write_leaving", pages, heads, *written)
    agree(table)
    agree(counts)
    agree(Pair(pages.host.top, pages.device.top))
    agree(mirror.stored(table, after.host))


def prompt(
    size: Size, window: int, rates: tuple[float, float], more: int = 0
) -> tuple[Mirror, Segments, tuple]:
    """A chunk of one sequence, an empty one, a whole prompt, a token: pages, recent, queries.

    The shorter ones have so many tokens `more`.
    """
    starts, queries = [size.prompt, 30, 0, 60 + more], [size.prompt - 10, 0, 33 + more, 1]
    ends = [a + b for a, b in zip(starts, queries, strict=True)]
    firsts = [max(0, start - window - 3) for start in starts]
    dims = size.dim, size.dim_v
    whole = [[size.randn(2, n, d, seed=n + i) for i, d in enumerate(dims)] for n in ends]
    chance = torch.Generator().manual_seed(2)
    admitted = [torch.rand(2, n, generator=chance) < torch.tensor(rates)[:, None] for n in ends]
    stored = []
    for (k, v), admit, end in zip(whole, admitted, ends, strict=True):
        at = [admit[h, : max(end - window, 0)].nonzero()[:, 0] for h in (0, 1)]
        stored.append([(k[h, at[h]], v[h, at[h]], at[h]) for h in (0, 1)])
    cut = list(zip(whole, firsts, strict=True))
    recent = [torch.cat([x[i][:, first:] for x, first in cut], 1) for i in (0, 1)]
    flags = torch.cat([x[:, first:] for x, first in zip(admitted, firsts, strict=True)], 1).byte()
    keys = [end - first for end, first in zip(ends, firsts, strict=True)]
    query = size.randn(sum(queries), 2 * size.group, size.dim, seed=3).transpose(0, 1)
    segments = segments_of(starts, queries, keys)
    return make_mirror(size, stored), segments, (query, *recent, flags)


@case("prefill_attention")
def _prefill_attention(given_size: Size) -> None:
    choose, small = sparse.choose_tile, Tile(32, 16, 4, 2)
    for rates, descriptors, cut in (
        ((0.9, 0.3), True, False), ((1.0, 0.0), False, False), ((0.9, 0.6), True, True),
        ((0.9, 0.6), False, True), ((0.0, 0.0), False, False),
    ):  # fmt: skip
        # Rectangles want values of the keys' head_dim.
        size = attrs.evolve(given_size, dim_v=given_size.dim) if cut else given_size
        mirror, segments, given = prompt(size, 9, rates)

        def tile(dim, itemsize, shared, descriptors=descriptors):
            found = choose(dim, itemsize, shared) if CUDA else small
            return found._replace(descriptors=descriptors and (found.descriptors or not CUDA))

        # Whether rectangles pay and who computes them is not the matter here.
        span = tile(size.dim, size.dtype.itemsize, 227 << 10).queries(size.group) * 2
        rectangles = Rectangles(Dense(), queries=span, spare=8, least=16, average=0, work=0)
        chosen = rectangles if cut else None
        with (
            mock.patch.object(sparse, "choose_tile", tile),
            mock.patch.object(sparse, "choose_rectangles", lambda *_, chosen=chosen: chosen),
        ):
            pages = (mirror.pages, mirror.heads)
            found = both("prefill_attention", *given, segments, *pages, 9, size.dim**-0.5)
        agree(found, size.atol)
        assert not cut or any(rectangles.attend.rows)


@case("dense_prefill")
def _dense_prefill(size: Size) -> None:
    mirror, segments, (query, key, value, _) = prompt(size, 9, (1.0, 1.0))
    # A sanitizer neither sees cuDNN's bulk stores nor has anything to say to us about its kernels.
    order = [x for x in dense._ORDER if x != SDPBackend.CUDNN_ATTENTION]
    with (
        mock.patch.object(dense, "find_flash", lambda *_: None),
        mock.patch.object(dense, "_ORDER", order),
    ):
        given = (query, key, value, segments, mirror.pages, mirror.table)
        agree(both("dense_prefill", *given, size.dim**-0.5), size.atol)


def tile_reads(segments: Segments, heads: int, tile: int, columns: bool) -> Pair:
    """Blocks that tiles read by chance, of query heads or KV heads, and columns."""
    spans, chance = tile_spans(segments, tile), torch.Generator().manual_seed(6)
    numbers = [n for low, high in spans for n in range(low, high)]
    width = max(high for _, high in spans)
    blocks = torch.rand(heads, len(numbers), width, generator=chance) < 0.4
    blocks &= torch.arange(width) <= torch.tensor(numbers)[:, None]
    if not columns:
        return pair(TileReads(tile, blocks))
    owner = [b for b, (low, high) in enumerate(spans) for _ in range(low, high)]
    where = torch.rand(heads, len(spans), width * tile, generator=chance).argsort(-1)[..., :11]
    return pair(TileReads(tile, blocks, where.sort(-1).values.int(), torch.tensor(owner).int()))


@case("selected_prefill")
def _selected_prefill(size: Size) -> None:
    choose = selected.choose_tile
    shapes = [
        (16, (0.9, 0.3), True, True, False), (8, (1.0, 0.0), False, False, True),
        (64, (0.7, 1.0), True, True, True), (16, (0.0, 0.0), False, True, False),
    ]  # fmt: skip
    if CUDA:  # what the kernel for capability 9.0 takes
        shapes.append((128, (0.9, 0.4), True, True, False))
    for tile, rates, descriptors, each, columns in shapes:
        window, more = (140, 100) if tile == 128 else (9, 0)
        mirror, segments, (query, key, value, _) = prompt(size, window, rates, more)

        def shape(tile, dim, itemsize, shared, descriptors=descriptors):
            found = choose(tile, dim, itemsize, shared)
            if not CUDA:
                found = found._replace(queries=min(tile, 32), keys=16, rest=16)
            return found._replace(descriptors=descriptors and (found.descriptors or not CUDA))

        reads = tile_reads(segments, 2 * size.group if each else 2, tile, columns)
        with mock.patch.object(selected, "choose_tile", shape):
            given = query, key, value, segments, mirror.pages, mirror.heads, window
            agree(both("selected_prefill", *given, size.dim**-0.5, reads), size.atol)


@case("keys_at", "antidiagonal_blocks")
def _antidiagonal_blocks(size: Size) -> None:
    choose = antidiagonal.choose_tile
    for tile, stride, rates, scratch in ((16, 4, (0.9, 0.3), 1), (32, 8, (1.0, 0.5), 1 << 20)):
        mirror, segments, (query, key, _, flags) = prompt(size, 9, rates)
        placed = both("keys_at", key, flags, segments, mirror.pages, mirror.heads, tile)
        agree(Pair(*(x[0] for x in placed)))
        agree(Pair(*(x[1].float() for x in placed)))
        for threshold, softcap in ((0.6, None), (1.0, 20.0)):
            given = [Pair(*x) for x in zip(*placed, strict=True)]

            def shape(itemsize, shared, descriptors=threshold < 1):
                found = choose(itemsize, shared)
                if not CUDA:
                    found = found._replace(rows=32, columns=32, channels=16)
                return found._replace(descriptors=descriptors and (found.descriptors or not CUDA))

            with (
                mock.patch.object(antidiagonal, "_SCRATCH", scratch),
                mock.patch.object(antidiagonal, "choose_tile", shape),
            ):
                found = both(
                    "antidiagonal_blocks", query, *given, segments, size.dim**-0.5, tile, stride,
                    threshold, softcap=softcap,
                )  # fmt: skip
            # Masses that differ by rounding may turn the last block of a tile.
            differ = (found.host != found.device.cpu()).sum()
            assert differ <= (0 if threshold == 1 else 0.02 * found.host.sum())
