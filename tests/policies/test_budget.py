"""Budgets against Python's sort and the published rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.budget import Adaptive, BudgetView, Pyramid, Ratio, Tokens, TotalCap
from kvpolicy.reference import keep_best

INF = float("inf")


def keep(budget, scores, valid, share, window=4):
    """What a budget keeps where each head has a share of so many global tokens."""
    target = torch.tensor(share)[:, None].expand(valid.shape[:2])
    return budget.keep(scores, valid, target, window, keep_best)


def told(seen, window=32, layers=1, heads=2, counts=None):
    """A view of all layers of a model with as many sequences as lengths."""
    return BudgetView(
        seen=tuple(seen), window=window, layers=tuple(range(layers)), of=layers,
        kv_heads=(heads,) * layers, counts=lambda: counts,
    )  # fmt: skip


def best_by_hand(scores, valid, amount):
    """Indices of the best valid tokens, ties to the later one."""
    order = sorted((n for n, ok in enumerate(valid) if ok), key=lambda n: (-scores[n], -n))
    return order[:amount]


@st.composite
def heads(draw, rows=4):
    length = draw(st.integers(0, 12))
    value = st.sampled_from([-INF, -1.0, 0.0, 0.5, 2.0])
    scores = draw(
        st.lists(st.lists(value, min_size=length, max_size=length), min_size=rows, max_size=rows)
    )
    valid = draw(
        st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows
        )
    )
    return scores, valid, length


@settings(deadline=None, derandomize=True)
@given(data=heads(), amounts=st.lists(st.integers(0, 14), min_size=4, max_size=4))
def test_keep_best_is_a_sort(data, amounts):
    scores, valid, length = data
    tensor = torch.tensor(scores).view(2, 2, length)
    ok = torch.tensor(valid, dtype=torch.bool).view(2, 2, length)
    kept = keep_best(tensor, ok, torch.tensor(amounts).view(2, 2)).view(4, length)
    for n, amount in enumerate(amounts):
        wanted = best_by_hand(scores[n], valid[n], amount)
        assert kept[n].nonzero().flatten().tolist() == sorted(wanted)


def test_budget_keep_gives_each_head_its_share():
    scores = torch.tensor([[[1.0, 3.0, 2.0], [9.0, 9.0, 9.0]]])
    kept = keep(Tokens(5), scores, torch.ones_like(scores).bool(), [2])
    assert kept.tolist() == [[[False, True, True], [False, True, True]]]


def ada_by_hand(scores, n_keep, floor):
    """NVIDIA/kvpress: protect each head's best, then drop the lowest of all heads together."""
    rows, length = len(scores), len(scores[0])
    cells = [(h, n) for h in range(rows) for n in range(length)]
    safe = set()
    for h in range(rows):
        order = sorted(range(length), key=lambda n: -scores[h][n])
        safe |= {(h, n) for n in order[: int(floor * n_keep)]}
    lowest_first = sorted(cells, key=lambda c: INF if c in safe else scores[c[0]][c[1]])
    return set(cells) - set(lowest_first[: rows * (length - n_keep)])


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.29, 0.7, 1.0])
@pytest.mark.parametrize("n_keep", [1, 7, 10, 30])
def test_adaptive_is_adakv(floor, n_keep):
    rng = torch.Generator().manual_seed(n_keep)
    scores = torch.randn(2, 4, 30, generator=rng, dtype=torch.float64)
    scores[:, 0] += 2  # a head that would take everything
    budget = Adaptive(Tokens(1000), floor=floor)
    kept = keep(budget, scores, torch.ones(2, 4, 30).bool(), [n_keep, n_keep])
    for b in range(2):
        wanted = ada_by_hand(scores[b].tolist(), n_keep, floor)
        assert {tuple(c) for c in kept[b].nonzero().tolist()} == wanted


def test_adaptive_floor_counts_as_python_does():
    # 0.29 * 100 is 28.999999999999996: int() of it is 28, and 29 in float32.
    scores = torch.arange(400.0).view(1, 2, 200)
    kept = keep(Adaptive(Tokens(100), floor=0.29), scores, torch.ones(1, 2, 200).bool(), [100])
    assert kept.sum(-1).tolist() == [[28, 172]]


def test_adaptive_gives_what_short_heads_leave():
    valid = torch.ones(1, 3, 10).bool()
    valid[:, 0, 2:] = False
    scores = torch.zeros(1, 3, 10)
    scores[:, 1] = 1.0
    kept = keep(Adaptive(Tokens(50), floor=0.5), scores, valid, [6])
    assert not (kept & ~valid).any()
    assert kept.sum(-1).tolist() == [[2, 10, 6]]
    kept = keep(Adaptive(Tokens(50)), scores, valid, [8])
    assert torch.equal(kept, valid)  # 24 allowed, 22 there


def test_tokens_and_ratio():
    assert [Tokens(7).tokens_per_head(n, 0, 4) for n in (1, 100)] == [7, 7]
    assert [Ratio(0.25).tokens_per_head(n, 0, 4) for n in (3, 4, 103)] == [0, 1, 25]


@pytest.mark.parametrize("budget", [Tokens(32), Adaptive(32), Pyramid(Adaptive(Tokens(32)))])
def test_a_fixed_budget_that_cannot_hold_the_window_is_refused_at_once(budget):
    budget.check(31)
    with pytest.raises(ValueError, match=r"budget: wanted at least window \+ 1 = 33 .*, got 32"):
        budget.check(32)


@pytest.mark.parametrize("budget", [Ratio(0.5), Adaptive(Ratio(0.5)), TotalCap(1)])
def test_what_depends_on_lengths_or_counts_fits_any_window(budget):
    budget.check(10**6)


def test_a_ratio_keeps_at_least_the_window():
    lengths = (31, 32, 33, 64, 66, 100)
    assert Ratio(0.5).targets(told(lengths)) == [[[n, n]] for n in (0, 0, 0, 0, 1, 18)]
    floored = [Ratio(0.5).floored(n, 32, 0, 1) for n in lengths]
    assert floored == [True, True, True, False, False, False]
    assert Tokens(40).allowed(4, 32, 0, 1) == 8 and not Tokens(40).floored(4, 32, 0, 1)


def test_a_pyramid_s_last_layers_keep_the_window():
    budget = Pyramid(1024)
    (found,) = budget.targets(told([9000], window=256, layers=32))
    asked = [budget.tokens_per_head(9000, layer, 32) for layer in range(32)]
    assert [heads[0] for heads in found] == [max(n - 256, 0) for n in asked]
    floored = [budget.floored(9000, 256, layer, 32) for layer in range(32)]
    assert floored == [n < 256 for n in asked] and 0 < sum(floored) < 32


@pytest.mark.parametrize("seen", [200, 1000, 100_000])
@pytest.mark.parametrize(("tokens", "beta", "layers"), [(128, 20.0, 32), (100, 1.0, 5), (96, 4, 2)])
def test_pyramid_is_a_line(seen, tokens, beta, layers):
    budget = Pyramid(Tokens(tokens), beta=beta, observation=32)
    held = [budget.tokens_per_head(seen, layer, layers) for layer in range(layers)]
    mean = tokens - 32
    low = mean / beta
    high = 2 * mean - low
    if high >= seen - 32:  # the first layer cannot hold more than there is
        high = seen - 32
        low = 2 * mean - high
    step = (high - low) / (layers - 1)
    assert held == [round(high - layer * step) + 32 for layer in range(layers)]
    assert held == sorted(held, reverse=True)
    assert held[0] <= seen
    assert abs(sum(held) / layers - tokens) <= 0.5


def test_pyramid_without_a_slope_is_its_base():
    assert Pyramid(Tokens(64)).tokens_per_head(1000, 0, 1) == 64
    assert Pyramid(Tokens(20)).tokens_per_head(1000, 3, 8) == 20
    one = Pyramid(Tokens(9), beta=20, observation=8)  # a mean of 1 beyond the observed queries
    assert [one.tokens_per_head(500, layer, 4) for layer in range(4)] == [10, 9, 9, 8]
    assert Pyramid(Tokens(500)).tokens_per_head(100, 3, 8) == 500  # more than was seen


def test_pyramid_and_adaptive_nest_both_ways():
    scores = torch.arange(40.0).view(1, 2, 20)
    valid = torch.ones(1, 2, 20).bool()
    inner, outer = Pyramid(Adaptive(Tokens(64))), Adaptive(Pyramid(Tokens(64)))
    assert keep(inner, scores, valid, [10]).sum(-1).tolist() == [[2, 18]]
    assert keep(outer, scores, valid, [10]).sum(-1).tolist() == [[2, 18]]
    for layer in range(4):
        assert inner.tokens_per_head(500, layer, 4) == outer.tokens_per_head(500, layer, 4)


def test_total_cap_rounds_drop_a_part_of_every_head():
    counts = [[100, 57], [9, 0]]
    assert TotalCap(166).lengths(counts) == counts
    # One round: floor(0.1 * length) of each head.
    assert TotalCap(165).lengths(counts) == [[90, 52], [9, 0]]
    assert TotalCap(150).lengths(counts) == [[81, 47], [9, 0]]
    assert counts == [[100, 57], [9, 0]]
    assert TotalCap(59, drop=0.5).lengths([[100, 3], [7, 7]]) == [[25, 1], [2, 2]]


def test_total_cap_ends_where_no_part_is_left():
    assert TotalCap(10).lengths([[9, 9], [1, 0]]) == [[5, 5], [0, 0]]
    assert TotalCap(13).lengths([[9, 9], [1, 0]]) == [[6, 6], [0, 0]]
    assert sum(TotalCap(1).lengths([[9] * 3] * 3)[0]) == 0
    with pytest.raises(TypeError, match="TotalCap counts over all heads"):
        TotalCap(10).tokens_per_head(1, 0, 1)
    counts = [[[9, 9], [1, 0]], [[2, 3], [4, 1]]]
    assert TotalCap(10).targets(told([20, 20], layers=2, counts=counts)) == [
        [[5, 5], [0, 0]],
        [[2, 3], [4, 1]],
    ]
    assert not TotalCap(10).floored(1, 1, 0, 1)


def test_budgets_are_values():
    assert Adaptive(Tokens(5)) == Adaptive(Tokens(5), floor=0.2)
    assert len({Tokens(5), Tokens(5), Ratio(0.5), Pyramid(Tokens(5)), TotalCap(5)}) == 4
