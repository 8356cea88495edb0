"""Pages twice, on the device and on the host, and calls of an op with both of its backends.

On the device only what a cache would have written is ever written: what is left is for a tool to
find that looks for reads of such memory. The reference takes the host's copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import attrs
import torch
from torch import Tensor

from kvpolicy.ops import Arenas, Heads, Numbers, Pages, Ring, Segments, TileReads, load
from tests.support.kernels.pool import DEVICE, Pool, make_pool

SLAB_PAGES = 4


@attrs.frozen(kw_only=True)
class Size:
    """What a kernel is compiled for; `prompt` is the length of a prompt.

    Values have `dim_v` channels, as many as keys or fewer.
    """

    dim: int
    page: int
    dtype: torch.dtype
    group: int
    first: str = "low"
    prompt: int = 300
    dim_v: int = attrs.field(default=attrs.Factory(lambda self: self.dim, takes_self=True))

    def randn(self, *shape: int, seed: int) -> Tensor:
        """Normal numbers on the host."""
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.dtype)

    def values(self, key: Tensor) -> Tensor:
        """Values to go with keys `[..., D]`."""
        return -key[..., : self.dim_v]

    @property
    def atol(self) -> float:
        """What sums over tokens may differ by."""
        return 3e-5 if self.dtype == torch.float32 else 4e-2


class Pair(NamedTuple):
    """One thing on the host and on the device."""

    host: Any
    device: Any


def placed(tensor: Tensor) -> Tensor:
    """A copy on the device."""
    return tensor.to(DEVICE, copy=True)


def pair(given: Any) -> Pair:
    """Copies tensors and what holds tensors to the device."""
    if isinstance(given, Pair):
        return given
    if isinstance(given, Tensor):
        return Pair(given, placed(given))
    if isinstance(given, Segments | Heads | Ring | Numbers | TileReads | Arenas):
        sides = [pair(x) for x in given]
        return Pair(*(type(given)(*side) for side in zip(*sides, strict=True)))
    return Pair(given, given)


def both(op: str, *args: Any, **options: Any) -> Pair:
    """Calls an op of both backends, each with its side of the arguments."""
    pairs = [pair(x) for x in args]
    named = {name: pair(x) for name, x in options.items()}
    host = getattr(load("reference"), op)(
        *(x.host for x in pairs), **{name: x.host for name, x in named.items()}
    )
    device = getattr(load("triton"), op)(
        *(x.device for x in pairs), **{name: x.device for name, x in named.items()}
    )
    return Pair(host, device)


def agree(found: Pair, atol: float = 0.0) -> None:
    """Raises AssertionError where host and device differ by more than `atol`, or are not finite."""
    if isinstance(found.host, tuple):
        for sides in zip(*found, strict=True):
            agree(Pair(*sides), atol)
        return
    got = found.device.cpu()
    assert got.isfinite().all()
    torch.testing.assert_close(got, found.host, rtol=0, atol=atol)


@attrs.define
class Mirror:
    """Pages of both sides, and on the host the table `[B, Hkv, M]` and counts `[B, Hkv]`."""

    pool: Pool
    pages: Pair
    table: Tensor
    counts: Tensor

    @property
    def heads(self) -> Heads:
        return Heads(self.table, self.counts)

    def fork(self) -> None:
        """Adds a sequence that shares the pages of the first."""
        held = self.table[0][self.table[0] > 0].long()
        for pages in self.pages:
            pages.refs[held.to(pages.refs.device)] += 1
        self.table = torch.cat([self.table, self.table[:1]])
        self.counts = torch.cat([self.counts, self.counts[:1]])

    def stored(self, table: Pair, counts: Tensor) -> Pair:
        """k, v and meta of every head's tokens, page by page, on both sides."""
        size = self.pages.host.k.shape[1]
        found: Pair = Pair(([], [], []), ([], [], []))
        tables = table.host, table.device.cpu()
        for b, h in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            count = int(counts[b, h])
            for number in range(-(-count // size)):
                here = min(size, count - number * size)
                host, device = (int(x[b, h, number]) for x in tables)
                extent = self.pool.extents[device // SLAB_PAGES]
                for part, store in zip(found.host, self.pages.host[:3], strict=True):
                    part.append(store[host, :here])
                for part, store in zip(found.device, extent, strict=False):
                    part.append(store[device % SLAB_PAGES, :here].cpu())
        return Pair(*(tuple(torch.cat(x) for x in side if x) for side in found))


def make_mirror(size: Size, heads: list[list[Any]], spare: int = 0, seed: int = 1) -> Mirror:
    """Stores tokens in heads: so many random ones, or those given as k, v `[n, D]`, positions.

    Token n of random ones has position n. `spare` more pages are free.
    """
    dims = size.dim, size.dim_v

    def noise(n: int, first: int) -> tuple[Tensor, ...]:
        drawn = (size.randn(n, d, seed=first + i) for i, d in enumerate(dims))
        return (*drawn, torch.arange(n))

    filled = [
        [noise(n, seed + 2 * (9 * b + h)) if isinstance(n, int) else n for h, n in enumerate(row)]
        for b, row in enumerate(heads)
    ]
    need = [[-(-len(at) // size.page) for _, _, at in row] for row in filled]
    pool = make_pool(
        sum(map(sum, need)) + spare + 1, size.page, size.dim, size.dtype, slab_pages=SLAB_PAGES,
        dim_v=size.dim_v, width=2 * size.dim, first=size.first, poison=False,
    )  # fmt: skip
    free = pool.pages.free.to("cpu", copy=True)
    total = len(free) + 1
    host = Pages(
        *(torch.zeros(total, size.page, d, dtype=size.dtype) for d in (size.dim, size.dim_v)),
        torch.zeros(total, size.page, dtype=torch.int32),
        torch.zeros(total, 2 * size.dim, dtype=size.dtype),
        torch.zeros(1, 4, dtype=torch.int64), total, free, pool.pages.top.to("cpu", copy=True),
        pool.pages.refs.to("cpu", copy=True),
    )  # fmt: skip
    table = torch.zeros(len(filled), len(filled[0]), max(map(max, need)) + 3 + spare).int()
    for b, row in enumerate(filled):
        for h, (k, v, at) in enumerate(row):
            for number in range(need[b][h]):
                page = int(free[host.top.sub_(1)])
                table[b, h, number], host.refs[page] = page, 1
                part = slice(number * size.page, (number + 1) * size.page)
                here = len(at[part])
                bounds = torch.cat([k[part].amin(0), k[part].amax(0)])
                extent = pool.extents[page // SLAB_PAGES]
                for mine, own, new in zip(host, extent, (k, v, at.int()), strict=False):
                    mine[page, :here] = new[part]
                    own[page % SLAB_PAGES, :here].copy_(mine[page, :here])
                host.summary[page] = bounds
                extent[3][page % SLAB_PAGES].copy_(bounds)
    pool.pages.top.copy_(host.top)
    pool.pages.refs.copy_(host.refs)
    counts = torch.tensor([[len(at) for _, _, at in row] for row in filled], dtype=torch.int32)
    return Mirror(pool, Pair(host, pool.pages), table, counts)
