"""Evictions that look at attention maps, against formulas written here anew in plain loops."""

from __future__ import annotations

import math

import pytest

from kvpolicy import CachePipeline, DBudgetKV, FastGen, SageKV, SimLayerKV
from kvpolicy.testing import check_eviction
from tests.support.sines import KEY, QUERY, T, kept

HEADS = range(2)


def row(query, at, tokens):
    """Softmax weights of a query head at `at` over the `tokens` of its KV head not after it."""
    logits = {n: float(QUERY[query, at] @ KEY[query // 2, n]) * 8**-0.5 for n in tokens if n <= at}
    total = sum(map(math.exp, logits.values()))
    return {n: math.exp(x) / total for n, x in logits.items()}


def maps(head, observation):
    """Rows of a KV head's two query heads for the last `observation` queries of the prompt."""
    last = range(T)[-observation:]
    return [row(q, at, range(T)) for q in (2 * head, 2 * head + 1) for at in last]


def norm(rows, held):
    return math.sqrt(sum(weights.get(n, 0) ** 2 for weights in rows for n in held))


@pytest.mark.parametrize("group", ["max", "mean"])
def test_sage_kv_chooses_once_by_the_last_query(group):
    policy = SageKV(budget=20, sinks=3, group=group)
    found = kept(policy, window=8)
    for head in HEADS:
        one, other = maps(head, 1)
        of = {n: max(one[n], other[n]) if group == "max" else one[n] + other[n] for n in range(40)}
        best = sorted(range(3, 40), key=lambda n: -of[n])[:9]
        assert found[head] == [0, 1, 2, *sorted(best), *range(40, T)]


def test_sage_kv_never_grows():
    """Tokens that leave the window are gone, those of the prompt and generated ones."""
    chosen = kept(SageKV(budget=20, sinks=3), window=8, prompt=36)
    assert [len(tokens) for tokens in chosen] == [20, 20]
    for tokens in chosen:
        assert tokens[:3] == [0, 1, 2] and tokens[-8:] == list(range(40, T)) and tokens[-9] < 28


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.2])
def test_dbudgetkv_stops_where_the_norm_would_fall(threshold):
    found = kept(DBudgetKV(threshold=threshold, sinks=2, observation=6))
    for head in HEADS:
        rows, tokens = maps(head, 6), list(range(T))
        for oldest in range(2, T - 6):  # the least of the ranks first
            left = [n for n in tokens if n != oldest]
            if norm(rows, left) < (1 - threshold) * norm(rows, range(T)):
                break
            tokens = left
        assert found[head] == tokens and len(tokens) + 40 > T - 6


@pytest.mark.parametrize("recovery", [0.3, 0.6, 0.8, 0.95])
def test_fastgen_takes_the_first_set_that_is_enough(recovery):
    policy = FastGen(recovery=recovery, frequent=0.3, local=0.25, sinks=2, observation=6)
    found = kept(policy)
    for head in HEADS:
        rows = maps(head, 6)
        mass = [sum(r.get(n, 0) for r in rows) for n in range(T)]
        far, near = range(T - 6), set(range(T - 6, T))
        frequent = sorted(far, key=lambda n: -mass[n])[: int(0.3 * len(far))]
        sets = [{0, 1} | near]
        sets.append(sets[-1] | set(frequent))
        sets.append(sets[-1] | set(range(T - 12, T)))
        sets.append(set(range(T)))
        share = [sum(mass[n] for n in held) / sum(mass) for held in sets]
        assert all(abs(x - recovery) > 1e-6 for x in share)
        wanted = next(held for held, x in zip(sets, share, strict=True) if x >= recovery)
        assert found[head] == sorted(wanted)


def test_fastgen_takes_each_of_its_sets_somewhere():
    sizes = set()
    for recovery in (0.05, 0.3, 0.6, 0.95):
        policy = FastGen(recovery=recovery, frequent=0.3, local=0.25, sinks=2, observation=6)
        sizes |= {len(tokens) for tokens in kept(policy)}
    assert len(sizes) >= 3 and T in sizes


def test_simlayerkv_asks_the_layer_for_its_weight_on_sinks_and_recent_tokens():
    held = [0, 1, 2, *range(T - 12, T)]
    rows = [r for head in HEADS for r in maps(head, 2)]
    share = sum(r.get(n, 0) for r in rows for n in held) / len(rows)
    assert 0.1 < share < 0.9
    options = {"sinks": 3, "recent": 12, "observation": 2}
    assert kept(SimLayerKV(threshold=share - 1e-6, **options)) == [held, held]
    assert kept(SimLayerKV(threshold=share + 1e-6, **options)) == [list(range(T))] * 2


def test_a_window_wider_than_what_lazy_layers_keep_is_refused():
    with pytest.raises(ValueError, match="recent: wanted at least the window of 64, got 32"):
        CachePipeline(eviction=SimLayerKV(recent=32), window=64)


@pytest.mark.parametrize(
    "policy",
    [
        SageKV(budget=32),
        DBudgetKV(threshold=0.2, sinks=2, observation=5),
        DBudgetKV(threshold=0.2, observation=5, when="decode"),
        FastGen(recovery=0.5, observation=4),
        SimLayerKV(threshold=0.1, sinks=2, recent=16),
    ],
    ids=repr,
)
def test_the_contract_holds(policy):
    check_eviction(policy)
