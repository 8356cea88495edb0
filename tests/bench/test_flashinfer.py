"""What FlashInfer is given to read, and what becomes of its time."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy.bench import decode, flashinfer
from kvpolicy.bench.context import Bench
from kvpolicy.bench.data import tokens_of
from kvpolicy.bench.decode import Layer


@pytest.fixture
def bench() -> Bench:
    found = Bench(quick=True, seconds=60)
    found.copy_rate = found.flop_rate = 1e9
    return found


def gathered(store: Tensor, lists: tuple[Tensor, Tensor, Tensor], page: int) -> list[Tensor]:
    """Each request's tokens `[N, D]`, read through what `plan` takes."""
    starts, pages, ends = (x.tolist() for x in lists)
    return [
        store[pages[a:b]].flatten(0, 1)[: (b - a - 1) * page + end]
        for a, b, end in zip(starts[:-1], starts[1:], ends, strict=True)
    ]


# Means whose heads end inside a page and at the end of one.
@pytest.mark.parametrize(("mean", "page"), [(47, 16), (40, 16), (47, 64), (160, 64), (900, 16)])
def test_pages_name_stored_then_recent_tokens(bench: Bench, mean: int, page: int) -> None:
    layer = Layer(bench, mean, page)
    paged = flashinfer.Paged(layer)
    assert len(paged.lists) == len(layer.tables)
    now, slots = int(layer.now), layer.rings[0][0].shape[2]
    for index, (table, _) in enumerate(layer.tables):
        found = [gathered(store, paged.lists[index], page) for store in (paged.k, paged.v)]
        for head, n in enumerate(layer.lengths):
            used = table[0, head, : -(-n // page)]
            for x, want, ring in zip(
                found, tokens_of(layer.pool, used, n), layer.rings[index], strict=False
            ):
                recent = [ring[0, head, t % slots] for t in range(now - layer.window + 1, now + 1)]
                assert want is not None
                assert torch.equal(x[head], torch.cat([want, torch.stack(recent)]))


class Wrapper:
    """FlashInfer's wrapper in plain torch; `off` is what its results are wrong by."""

    off = {True: 1.0, False: 1.0}

    def __init__(self, workspace: Tensor, use_tensor_cores: bool, backend: str) -> None:
        self.kind = use_tensor_cores

    def plan(self, *args: Any, sm_scale: float, **dtypes: torch.dtype) -> None:
        *lists, self.group, kv_heads, self.dim, self.page = args
        self.lists, self.scale = tuple(lists), sm_scale
        assert kv_heads == 1

    def run(self, query: Tensor, stores: tuple[Tensor, Tensor]) -> Tensor:
        k, v = (gathered(store.squeeze(2), self.lists, self.page) for store in stores)
        out = [
            (q.double() @ a.double().T * self.scale).softmax(-1) @ b.double()
            for q, a, b in zip(query, k, v, strict=True)
        ]
        assert query.shape[1:] == (self.group, self.dim)
        return (torch.stack(out) * self.off[self.kind]).to(query.dtype)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times that are found in turn; FlashInfer can be imported."""
    times = [3.0, 2.0]
    module = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer, "captured_ms", lambda calls, device: times.pop(0))
    return times


def test_the_faster_kernel_counts(bench: Bench, timed: list[float]) -> None:
    layer = Layer(bench, 47, 16)
    assert flashinfer.flashinfer_ms(bench, "case", layer) == 2.0 and not timed


def test_a_wrong_kernel_of_theirs_is_not_timed(
    bench: Bench,
    timed: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layer = Layer(bench, 47, 16)
    monkeypatch.setitem(Wrapper.off, True, 1.02)
    assert flashinfer.flashinfer_ms(bench, "case", layer) == 3.0 and timed == [2.0]
    assert "tensor cores: CheckFailed" in capsys.readouterr().out
    monkeypatch.setitem(Wrapper.off, False, 1.02)
    assert flashinfer.flashinfer_ms(bench, "case", layer) is None and timed == [2.0]


def test_without_flashinfer_there_is_one_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    layer = Layer(bench, 47, 16)
    assert [flashinfer.flashinfer_ms(bench, "case", layer) for _ in range(2)] == [None, None]
    assert capsys.readouterr().out.count("no FlashInfer") == 1


def test_the_row_names_both_comparisons(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "captured_ms", lambda calls, device: 0.5)
    monkeypatch.setattr(decode, "flashinfer_ms", lambda *_: 0.75)
    small = Layer(bench, 47, 16)
    monkeypatch.setattr(decode, "Layer", lambda *_: small)
    bench.shared["decode", 8_000, 64] = 0.4
    bench.quick = False
    (row,) = decode.ragged_decode(bench, "8K page 16", 8_000, 16)
    assert row.baseline == "1.250x page 64, 1.50x FlashInfer 750 us"
