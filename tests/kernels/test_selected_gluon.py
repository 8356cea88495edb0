"""The Gluon kernel of tiles that choose blocks: run as Python by threads, or by a Hopper device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy.kernels import selected_gluon
from kvpolicy.kernels import selected_prefill as selected
from kvpolicy.kernels._launch import capability
from kvpolicy.ops import Heads, TileReads
from tests.kernels.test_selected_prefill import check
from tests.support.kernels.gluon_threads import Threads
from tests.support.kernels.plain import Asks
from tests.support.kernels.pool import CUDA, DEVICE, fill_heads, make_pool, randn
from tests.support.kernels.prefill import make_segments
from tests.support.on_gpu import on_gpu

NARROW = {"tile": 128, "window": 40, "page": 16, "dim": 64, "dtype": torch.bfloat16}
SLOW = pytest.mark.slow


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launched = kernel, 0

    def __getitem__(self, grid: tuple[int]) -> Any:
        self.launched += 1
        return self.kernel[grid]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The kernel as far as this machine can run it; the test must have launched it."""
    if CUDA and capability(DEVICE) != 90:
        pytest.skip("needs a device of compute capability 9.0, or none")
    own = selected_gluon._attend_listed
    found = Counted(own) if CUDA else Threads(selected_gluon, own)
    monkeypatch.setattr(selected, "capability", lambda device: 90)
    monkeypatch.setattr(selected_gluon, "_attend_listed", found)
    yield found
    assert found.launched


@pytest.mark.parametrize("options", [
    {"starts": [200, 60], "queries": [310, 200]},
    {"starts": [130, 300, 0], "queries": [290, 0, 129], "window": 300, "rates": (0.0, 1.0)},
    *(pytest.param(x, marks=SLOW) for x in (
        {"starts": [700], "queries": [140], "window": 1, "each": False, "group": 3},
        {"starts": [450], "queries": [600], "tile": 256, "window": 129, "density": 1.0},
        {"starts": [450], "queries": [600], "rates": (1.0, 1.0), "asks": Asks(sink=1.0)},
        {"starts": [333], "queries": [300], "dim": 128, "dtype": torch.float16, "density": 0.0},
    )),
], ids=str)  # fmt: skip
def test_options(options: dict, kernel: Any) -> None:
    check(**(NARROW | options))


def test_another_sequence_is_not_read(kernel: Any) -> None:
    """NaN of the next sequence would come through any product, whatever its mask says."""
    counts, starts, queries, window = [[70, 100], [90, 10]], [230, 100], [150, 40], 60
    pool = make_pool(64, 16, 64, torch.bfloat16, slab_pages=8)
    at = [[torch.arange(n) for n in row] for row in counts]
    at[0][1] *= 2  # a block begins in the midst of a head's only 128 rows
    table, held = fill_heads(pool, counts, seed=1, positions=at)
    keys = [a + min(b, window) for a, b in zip(queries, starts, strict=True)]
    segments = make_segments(starts, queries, [keys[0], 140])
    key, value = (randn(2, keys[0] + 140, 64, dtype=torch.bfloat16, seed=s) for s in (2, 3))
    query = randn(4, sum(queries), 64, dtype=torch.bfloat16, seed=4)
    blocks = torch.ones(4, 4, 3, dtype=torch.bool, device=DEVICE)

    def attend() -> Tensor:
        return selected.selected_prefill(
            query, key, value, segments, pool.pages, Heads(table, held), window, 0.1,
            TileReads(128, blocks),
        )[:, : queries[0]]  # fmt: skip

    clean = attend()
    assert bool(clean.isfinite().all())
    pages = pool.flat()
    for store in (pages.k, pages.v):
        store[table[1].flatten().long()] = float("nan")
    pool.fill(pages)
    for x, first in ((query, queries[0]), (key, keys[0]), (value, keys[0])):
        x[:, first:] = float("nan")
    assert torch.equal(attend(), clean)


@pytest.mark.parametrize("shape", [(3, 200, 64), (1, 200, 64), (3, 1, 64)])
def test_rows_of_any_strides(shape: tuple[int, int, int]) -> None:
    """A descriptor, and where in it the rows of a head are."""
    heads, tokens, dim = shape
    plain = randn(*shape, dtype=torch.bfloat16, seed=1)
    wide = randn(heads, tokens, dim + 8, dtype=torch.bfloat16, seed=2)
    for x in (
        plain, plain.transpose(0, 1).contiguous().transpose(0, 1), wide[..., :dim], wide[..., 4:-4],
        plain.transpose(1, 2).contiguous().transpose(1, 2), plain[:1].expand(heads, -1, -1),
    ):  # fmt: skip
        found, rows, columns = selected_gluon._rows(x, 64)
        (count, width), (step, _) = found.shape, found.strides
        seen = found.base.as_strided((count, width), (step, 1))
        for head in range(heads):
            own = seen[head * rows :][:tokens, head * columns :][:, :dim]
            assert torch.equal(own, x[head])


@on_gpu("options", [
    {"starts": [1900, 0], "queries": [1300, 700]},
    {"starts": [0], "queries": [4096], "rates": (1.0, 1.0), "window": 256, "density": 0.1},
    {"starts": [3000], "queries": [1025], "dim": 64, "group": 4, "page": 64, "density": 1.0},
    {"starts": [1000], "queries": [2000], "dtype": torch.float16, "tile": 512, "window": 1000},
    {"starts": [1000], "queries": [2000], "asks": Asks(sink=1.0), "rates": (0.02, 0.5)},
], ids=str)  # fmt: skip
def test_longer_prompts(options: dict, kernel: Any) -> None:
    check(**(NARROW | {"dim": 128} | options))
