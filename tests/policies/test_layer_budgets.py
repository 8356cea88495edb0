"""Budgets over layers and heads, against their rules in plain lists."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import (
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
    ],
    ids=lambda budget: type(budget).__name__,
)
def test_the_contract_holds(budget):
    check_eviction(SnapKV(budget=budget, observation=8))
    check_eviction(SnapKV(budget=budget, observation=8, when="decode"))
