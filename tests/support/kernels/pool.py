"""Pools of several extents for kernel tests, and the error budget."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from kvpolicy.ops import Pages

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = DEVICE.type == "cuda"
NAN = float("nan")


@attrs.define
class Pool:
    """Pages whose slabs are allocated apart; whatever nobody wrote is NaN (or a wild position)."""

    pages: Pages
    extents: list[tuple[Tensor, ...]]

    def flat(self) -> Pages:
        """The same contents in one extent, as the reference takes them. A copy."""
        parts = [torch.cat(column) for column in zip(*self.extents, strict=True)]
        k, v, meta = parts[:3]
        return self.pages._replace(
            k=k,
            v=v,
            meta=meta,
            summary=parts[3] if len(parts) > 3 else None,
            free=self.pages.free.clone(),
            top=self.pages.top.clone(),
            refs=self.pages.refs.clone(),
        )

    def fill(self, pages: Pages) -> None:
        """Replaces the contents by those of one extent."""
        size = self.pages.slab_pages
        for number, extent in enumerate(self.extents):
            for own, new in zip(
                extent, (pages.k, pages.v, pages.meta, pages.summary), strict=False
            ):
                own.copy_(new[number * size : (number + 1) * size])


def slab(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory of some pages that nobody wrote."""
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def make_pool(
    count: int,
    page: int,
    dim: int,
    dtype: torch.dtype,
    *,
    slab_pages: int,
    dim_v: int | None = None,
    width: int = 0,
    first: str = "low",
    poison: bool = True,
) -> Pool:
    """A pool of at least `count` pages, all free but the null page.

    `first` says whether the first extent has the lowest address or the highest one. Without
    `poison` nobody writes the contents, as a tool that looks for such reads wants it.
    """
    slabs = -(-count // slab_pages)
    shapes = [(page, dim), (page, dim_v or dim), (page,), (width,)][: 4 if width else 3]
    columns = []
    for shape in shapes:
        kind = torch.int32 if shape == (page,) else dtype
        column = [slab(slab_pages, *shape, dtype=kind) for _ in range(slabs)]
        for extent in column if poison else []:
            extent.fill_((1 << 29) + 7 if kind == torch.int32 else NAN)
        column.sort(key=lambda extent: extent.data_ptr(), reverse=first == "high")
        columns.append(column)
    offsets = torch.zeros(slabs, 4, dtype=torch.int64)
    for index, column in enumerate(columns):
        for row, extent in enumerate(column):
            step, rest = divmod(
                extent.data_ptr() - column[0].data_ptr(), 16 * extent.element_size()
            )
            assert rest == 0
            offsets[row, index] = step
    total = slabs * slab_pages
    order = torch.randperm(total - 1, generator=torch.Generator().manual_seed(total)) + 1
    refs = torch.zeros(total, dtype=torch.int32, device=DEVICE)
    refs[0] = 1
    pages = Pages(
        columns[0][0],
        columns[1][0],
        columns[2][0],
        columns[3][0] if width else None,
        offsets.to(DEVICE),
        slab_pages,
        order.to(torch.int32).to(DEVICE),
        torch.tensor([total - 1], dtype=torch.int32, device=DEVICE),
        refs,
    )
    return Pool(pages, list(zip(*columns, strict=True)))


def fill_heads(
    pool: Pool, counts: list[list[int]], seed: int, positions: list[list[Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """Stores random tokens in heads of the given lengths: table `[B, Hkv, M]` and counts.

    Token n of a head has position n, or those given. The last column of the table names no page.
    """
    pages = pool.flat()
    size = pages.k.shape[1]
    generator = torch.Generator().manual_seed(seed)
    width = max(-(-n // size) for row in counts for n in row) + 1
    table = torch.zeros(len(counts), len(counts[0]), width, dtype=torch.int32)
    height = int(pages.top)
    for b, row in enumerate(counts):
        for h, n in enumerate(row):
            for number in range(-(-n // size)):
                height -= 1
                page = int(pages.free[height])
                table[b, h, number] = page
                here = min(size, n - number * size)
                for store in (pages.k, pages.v):
                    noise = torch.randn(here, store.shape[2], generator=generator)
                    store[page, :here] = noise.to(store)
                at = torch.arange(number * size, number * size + here)
                if positions is not None:
                    at = positions[b][h][at]
                pages.meta[page, :here] = at.to(pages.meta)
                pages.refs[page] = 1
                if pages.summary is not None:
                    held = pages.k[page, :here]
                    pages.summary[page] = torch.cat([held.amin(0), held.amax(0)])
    pool.fill(pages)
    pool.pages.top.fill_(height)
    pool.pages.refs.copy_(pages.refs)
    return table.to(DEVICE), torch.tensor(counts, dtype=torch.int32, device=DEVICE)


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers that do not depend on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_within_budget(got: Tensor, eager: Tensor, exact: Tensor) -> float:
    """The kernel's error against float64 is at most twice the eager one's, plus rounding.

    Rounding is one unit for the result and one for the reduction over splits. Returns the budget.
    """
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    rounding = 2 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + rounding
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
    return allowed
