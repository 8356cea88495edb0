"""Budgets over layers and heads, against their rules in plain lists."""

from __future__ import annotations

import attrs
import numpy
import pytest
import torch

from kvpolicy import (
    LUKV,
    AcrossLayers,
    Adaptive,
    BudgetView,
    CachePipeline,
    CacheSpec,
    HeadKV,
    LazyLayers,
    SnapKV,
    Tokens,
)
from kvpolicy.testing import check_eviction

WINDOW, SEEN = 8, 60


def view_of(*scores, seen=SEEN):
    """A view of layers with these scores `[B, Hkv, N]`."""
    heads = tuple(x.shape[1] for x in scores)
    layers = tuple(range(len(scores)))
    return BudgetView(
        seen=(seen,) * len(scores[0]), window=WINDOW, layers=layers, of=len(layers),
        kv_heads=heads, counts=lambda: [], scores=scores,
    )  # fmt: skip


def drawn(layers=3, batch=2, heads=2, tokens=40):
    torch.manual_seed(1)
    sharp = torch.tensor([0.2, 1.0, 3.0])[:layers]
    return [(x * torch.randn(batch, heads, tokens)).softmax(-1) for x in sharp]


@pytest.mark.parametrize("floor", [0.0, 0.25, 1.0])
def test_the_best_of_all_layers_win_above_a_floor(floor):
    scores, n = drawn(), 10
    found = AcrossLayers(Tokens(WINDOW + n), floor=floor).targets(view_of(*scores))
    for row in range(2):
        counts, rest = {}, []
        for layer, of in enumerate(scores):
            for head in range(2):
                best = sorted(of[row, head].tolist(), reverse=True)
                counts[layer, head] = int(floor * n)
                rest += [(x, layer, head) for x in best[int(floor * n) :]]
        for _, layer, head in sorted(rest, reverse=True)[: 6 * n - sum(counts.values())]:
            counts[layer, head] += 1
        assert found[row] == [[counts[layer, head] for head in range(2)] for layer in range(3)]
        assert sum(map(sum, found[row])) == 6 * n


def test_padding_and_dropped_tokens_never_count():
    scores = drawn(batch=1)
    scores[1][0, 0, 5:] = float("-inf")
    padded = [torch.nn.functional.pad(x, (0, 9), value=float("-inf")) for x in scores]
    for budget in (AcrossLayers(Tokens(WINDOW + 35)), LazyLayers(Tokens(WINDOW + 35))):
        assert budget.targets(view_of(*scores)) == budget.targets(view_of(*padded))
    (found,) = AcrossLayers(Tokens(WINDOW + 35)).targets(view_of(*scores))
    assert found[1][0] <= 5


def test_lazy_layers_give_up_what_the_others_share():
    """Of three layers the first gives .05 of its weight to global tokens, the others .5 and .2."""
    even = torch.ones(1, 2, 20) / 20
    scores = [x * even for x in (0.05, 0.5, 0.2)]
    budget = LazyLayers(Tokens(WINDOW + 10), threshold=0.9, held=3)
    assert budget.targets(view_of(*scores)) == [[[3, 3], [13, 13], [13, 13]]]
    budget = LazyLayers(Tokens(WINDOW + 10), threshold=0.7, held=3)
    assert budget.targets(view_of(*scores)) == [[[3, 3], [24, 24], [3, 3]]]
    for threshold in (0.4, 0.99):  # all are lazy, none is
        budget = LazyLayers(Tokens(WINDOW + 10), threshold=threshold, held=3)
        assert budget.targets(view_of(*scores)) == [[[10, 10]] * 3]


def test_headkv_deals_a_pool_by_what_heads_are_worth():
    """FYYFU/HeadKV, ReasonSnapKVCluster: 100 tokens a head, beta 2, temperature 2: recorded."""
    worth = [[0.1, 0.4], [0.2, 0.3]]
    budget = HeadKV(Tokens(WINDOW + 100), importance=worth, beta=2, temperature=2)
    none = torch.zeros(1, 2, 0)
    assert budget.targets(view_of(none, none)) == [[[57, 157], [77, 110]]]
    flat = HeadKV(Tokens(WINDOW + 100), importance=worth, beta=2, temperature=0)
    assert flat.targets(view_of(none, none)) == [[[100, 100], [100, 100]]]


def test_importance_of_another_model_is_refused_before_anything_is_read():
    budget = HeadKV(Tokens(64), importance=[[1.0, 2.0]])
    pipeline = CachePipeline(eviction=SnapKV(budget=budget))
    wanted = r"importance: wanted .* = \[2\]\[2\] of the model, got \[1\]\[2\]"
    with pytest.raises(ValueError, match=wanted):
        pipeline.init(CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8))


# Of a head of Llama's kind, what it loses where 80 % go.
LOST = [[0.955, 0.72, 0.725], [0.5, 0.9999, 0.9]]


@pytest.mark.parametrize(
    ("seen", "wanted"), [(60, [[3, 17, 16], [30, 1, 6]]), (101, [[5, 28, 28], [51, 1, 10]])]
)
def test_lukv_keeps_what_kvpress_does(seen, wanted, tmp_path):
    """NVIDIA/kvpress, LUKVPress.compress on this curve: recorded."""
    curve = numpy.ones((99, 2, 3), dtype=numpy.float32)
    curve[79] = LOST
    numpy.save(tmp_path / "curve.npy", curve)
    exact = LUKV([[1 - x for x in row] for row in LOST])
    for budget in (exact, LUKV.from_curve(tmp_path / "curve.npy", 0.2)):
        none = torch.zeros(1, 3, 0)
        for window in (1, 8):
            view = attrs.evolve(view_of(none, none, seen=seen), window=window)
            assert budget.targets(view) == [[[max(n - window, 0) for n in x] for x in wanted]]
    assert [exact.tokens_per_head(seen, x, 2) for x in range(2)] == [sum(x) // 3 for x in wanted]


def test_lukv_says_what_does_not_fit(tmp_path):
    file = tmp_path / "curve.npy"

    def refused(match, keep=0.5, **changed):
        with pytest.raises(ValueError, match=match):
            LUKV.from_curve(changed.get("path", file), keep)

    numpy.save(file, numpy.zeros((99, 2, 3)))
    for keep in (0, 1, float("nan")):
        refused("keep: wanted a number above 0 and below 1", keep=keep)
    assert LUKV.from_curve(file, 0.999).parts == ((1.0,) * 3,) * 2
    numpy.save(file, numpy.zeros((98, 2, 3)))
    refused(r"curve\.npy: wanted floats \[99, L, Hkv\] from 0 to 1, got \[98, 2, 3\]")
    numpy.save(file, numpy.full((99, 2, 3), 1.5))
    refused("got 1.5 to 1.5")
    numpy.save(file, numpy.full((99, 2, 3), float("nan")))
    refused("got nan to nan")
    numpy.save(file, numpy.zeros((99, 2, 3), dtype=int))
    refused("got int64")
    file.write_bytes(b"no array")
    refused("got no .npy file")
    numpy.save(file, numpy.array([{}]), allow_pickle=True)
    refused("got no .npy file")
    file.write_bytes(b"")
    refused("got no .npy file")
    pipeline = CachePipeline(eviction=SnapKV(budget=LUKV([[0.5, 0.5]])))
    with pytest.raises(ValueError, match=r"parts: wanted .* = \[2\]\[2\] of the model"):
        pipeline.init(CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8))
    for wrong in ([[0.5], [0.5, 0.5]], [[]], [[1.5]], [[-0.1]]):
        with pytest.raises(ValueError, match="parts: wanted numbers from 0 to 1"):
            LUKV(wrong)


def test_one_that_binds_layers_cannot_be_wrapped_by_one_of_a_layer():
    with pytest.raises(TypeError, match="base: wanted a budget per head"):
        Adaptive(AcrossLayers(Tokens(64)))


def test_a_view_without_scores_says_how_to_ask():
    view = BudgetView(seen=(9,), window=4, layers=(0,), of=1, kv_heads=(1,), counts=lambda: [[[5]]])
    with pytest.raises(ValueError, match="a budget asks by `reads_scores = True`"):
        AcrossLayers(Tokens(6)).targets(view)


@pytest.mark.parametrize(
    "budget",
    [
        AcrossLayers(Tokens(48)),
        LazyLayers(Tokens(48), threshold=0.5),
        HeadKV(Tokens(48), importance=[[1, 2], [3, 1]]),
        LUKV([[0.2, 0.6], [0.5, 0.3]]),
    ],
    ids=lambda budget: type(budget).__name__,
)
def test_the_contract_holds(budget):
    check_eviction(SnapKV(budget=budget, observation=8))
    check_eviction(SnapKV(budget=budget, observation=8, when="decode"))
