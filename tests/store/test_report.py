"""What a report adds up: bytes of a cache counted by hand, and means over heads."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, LocalAttention, Quest, Report

SPEC = CacheSpec(
    layers=2, heads=4, kv_heads=2, head_dim=8, page_size=4, rollback=3, sliding=(None, 5)
)
TOKENS = 30


@pytest.fixture(scope="module")
def report() -> Report:
    """Layer 0 keeps 2 first tokens and 6 recent ones of 30; layer 1 slides over 5."""
    pipeline = CachePipeline(
        admission=LocalAttention(window=6, sinks=2), selection=Quest(budget=10), backend="reference"
    )
    state = pipeline.init(SPEC)
    pipeline.begin(state, [TOKENS], "prompt")
    for layer in range(2):
        query, key, value = (torch.randn(heads, TOKENS, 8) for heads in (4, 2, 2))
        pipeline.attend(state, layer, query, key, value)
    pipeline.commit(state)
    return pipeline.report(state)


def test_bytes_by_hand(report: Report) -> None:
    assert report.pages == 2 * 4 * (2 * 8 * 4)  # a page a head: 4 slots of keys and values
    assert report.ring == 2 * ((6 + 3) + (5 + 3)) * (2 * 8 * 4 + 1)
    assert report.kv == report.pages + report.ring
    parts = ("reserved", "positions", "summaries", "tables", "queries")
    assert report.total == report.kv + sum(getattr(report, part) for part in parts)
    assert report.positions == 2 * 4 * 4 and report.queries == 0
    assert report.summaries == 2 * 2 * 8 * 4  # least and largest key of each page


def test_means_leave_out_layers_that_slide(report: Report) -> None:
    assert report.sliding_layers == [1] and report.admitted[1] is None
    assert report.admitted[0] == pytest.approx([2 / TOKENS, 2 / TOKENS])
    assert report.mean_admitted == pytest.approx(2 / TOKENS)
    assert report.stored == [[8.0, 8.0], [5.0, 5.0]]
    assert report.mean_read == pytest.approx((8 + 8 + 5 + 5) / 4)


def test_means_of_unequal_heads(report: Report) -> None:
    other = attrs.evolve(report, admitted=[[0.5, 0.1], [0.0, 0.2]], read=[[1.0, 2.0], [3.0, 8.0]])
    assert other.mean_admitted == pytest.approx(0.2) and other.mean_read == 3.5
    assert attrs.evolve(report, admitted=[None, None]).mean_admitted == 1.0
