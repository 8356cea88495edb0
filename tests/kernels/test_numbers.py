"""Numbers that the host gives kernels: once a call, each row where 128 bits can be loaded."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.kernels import _launch, dense_prefill
from kvpolicy.kernels._chunks import cut_at_chunks
from kvpolicy.ops import Segments

CPU = torch.device("cpu")


def segments(lengths: list[int]) -> Segments:
    cu = (0, *torch.tensor(lengths).cumsum(0).tolist())
    on = [torch.tensor(x, dtype=torch.int32) for x in (cu, cu, [0] * len(lengths))]
    return Segments(cu, cu, (0,) * len(lengths), *on)


@pytest.mark.parametrize("lengths", [[5], [9], [20, 3], [7, 41, 2]])
def test_rows_of_chunks_are_aligned(lengths: list[int]) -> None:
    """Kernels are compiled for aligned pointers and for others: one of both serves all calls."""
    cut = cut_at_chunks(segments(lengths), 8)
    assert cut.owner is not None
    for tensor in (*cut.segments[3:], cut.owner):
        assert tensor.data_ptr() % 16 == 0 and tensor.is_contiguous()
    for host, device in zip(cut.segments[:3], cut.segments[3:], strict=True):
        assert list(host) == device.tolist()
    assert max(cut.owner.tolist()) == len(lengths) - 1


def test_layers_ask_for_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would wait for the device."""
    _launch.numbers_on.cache_clear()
    query, key = torch.randn(2, 5, 16), torch.randn(1, 9, 16)
    given = []

    def attend(*args: object, **options: object) -> torch.Tensor:
        given.append(args[4])
        return query

    monkeypatch.setattr(dense_prefill, "attend", attend)
    for _ in range(3):
        dense_prefill._tiles(query, key, key, 4, 0.25)
    info = _launch.numbers_on.cache_info()
    assert (info.misses, info.hits) == (1, 2)
    for found in given:
        assert isinstance(found, Segments)
        assert [x.tolist() for x in found[3:]] == [[0, 5], [0, 9], [4]]
        assert all(x.data_ptr() % 16 == 0 for x in found[3:])
