"""Quest's scores and the choice of pages, against bounds and plain lists."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.reference import top_pages
from kvpolicy.selection import Quest, SelectAll, TopChannels
from kvpolicy.selection._base import combine_group
from kvpolicy.testing import check_selection


def random_pages(seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 2, 4, 8, 16, generator=rng, dtype=torch.float64) * scale
    held = torch.randint(1, 9, (2, 2, 4), generator=rng)
    query = torch.randn(2, 2, 3, 16, generator=rng, dtype=torch.float64) * scale
    return keys, held, query


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.01, 1.0, 50.0]))
def test_quest_score_bounds_every_logit(seed, scale):
    keys, held, query = random_pages(seed, scale)
    keys, query = keys.float(), query.float()
    valid = torch.arange(8) < held[..., None]
    quest = Quest(budget=64)
    summary = quest.summarize(keys.view(-1, 8, 16), valid.view(-1, 8)).view(2, 2, 4, 32)
    scores = quest.score(query, summary, held)
    assert scores.shape == (2, 2, 3, 4)
    logits = torch.einsum("bhgd,bhmpd->bhgmp", query, keys).masked_fill(
        ~valid[:, :, None], float("-inf")
    )
    assert (logits.amax(-1) <= scores + 1e-4 * scale**2).all()


def test_quest_score_is_the_sum_of_larger_products():
    summary = torch.tensor([[[[-1.0, 2.0, 3.0, 5.0]]]])  # min (-1, 2), max (3, 5)
    query = torch.tensor([[[[2.0, -4.0]]]])
    score = Quest(budget=64).score(query, summary, torch.tensor([[[4]]]))
    assert score.item() == 2 * 3 + -4 * 2


def test_quest_bound_is_tight_for_a_page_of_one_token():
    keys, _, query = random_pages(1)
    one = torch.arange(8) == 3
    summary = Quest(budget=64).summarize(keys.view(-1, 8, 16), one.expand(16, 8))
    score = Quest(budget=64).score(query, summary.view(2, 2, 4, 32), torch.ones(2, 2, 4))
    logits = torch.einsum("bhgd,bhmd->bhgm", query, keys[:, :, :, 3])
    assert torch.allclose(score.double(), logits, atol=1e-5)


def test_summarize_ignores_invalid_slots():
    keys, held, _ = random_pages(2)
    keys, held = keys.view(-1, 8, 16), held.view(-1)
    valid = torch.arange(8) < held[:, None]
    poisoned = keys.masked_fill(~valid[..., None], 1e9)
    summary = Quest(budget=64).summarize(poisoned, valid)
    for page, count in enumerate(held.tolist()):
        real = keys[page, :count]
        wanted = torch.cat([real.min(0).values, real.max(0).values])
        assert torch.equal(summary[page], wanted)
    nan = keys.masked_fill(~valid[..., None], float("nan"))
    assert torch.equal(Quest(budget=64).summarize(nan, valid), summary)


def pick(scores, held, budget, first, last, full):
    """The choice of pages on plain lists; `full` is whether the trailing page is."""
    sure = range(held - (not full if last < 0 else last), held)
    worth = [math.inf if p < first else score for p, score in enumerate(scores)]
    order = sorted(range(held), key=lambda p: (p not in sure, -worth[p], p))
    chosen = sorted(order[:budget])
    return chosen + [-1] * (budget - len(chosen))


@settings(deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 9),
    page_size=st.sampled_from([1, 4, 16]),
    budget=st.integers(0, 11),
    first=st.integers(0, 3),
    last=st.integers(-1, 3),
    group=st.sampled_from([1, 3]),
)
def test_top_pages_is_the_plain_choice(seed, width, page_size, budget, first, last, group):
    rng = torch.Generator().manual_seed(seed)
    # Few values, so that there are ties.
    scores = torch.randint(-2, 3, (2, 2 * group, width), generator=rng).float()
    counts = torch.randint(0, width * page_size + 1, (2, 2), generator=rng)
    chosen = top_pages(scores, counts, page_size, budget, first, last)
    assert chosen.shape == (2, 2 * group, budget)
    assert chosen.dtype == torch.int32
    for n, row in enumerate(chosen.view(4 * group, budget).tolist()):
        held = math.ceil(counts.flatten()[n // group].item() / page_size)
        full = counts.flatten()[n // group].item() % page_size == 0
        scored = scores.view(4 * group, width)[n].tolist()
        assert row == pick(scored, held, budget, first, last, full)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_of_absent_pages_do_not_matter(bad):
    scores = torch.tensor([[[1.0, 3.0, 2.0, bad, bad]]])
    assert top_pages(scores, torch.tensor([[10]]), 4, 2, 0, 0).tolist() == [[[1, 2]]]


# Window 32, 100 tokens in pages of 16: six full ones and a trailing one of four.
@pytest.mark.parametrize(("budget", "read"), [(32, 32), (33, 36), (48, 36), (49, 52), (96, 84)])
def test_budget_counts_the_window_and_the_trailing_page(budget, read):
    pages = Quest(budget=budget).pages(32, 16)
    chosen = top_pages(torch.rand(1, 1, 7), torch.tensor([[100]]), 16, pages, 0, 1)
    assert 32 + sum(min(16, 100 - 16 * p) for p in chosen.flatten().tolist() if p >= 0) == read


def test_a_budget_of_everything_reads_everything():
    chosen = top_pages(torch.rand(1, 1, 7), torch.tensor([[100]]), 16, 9, 0, 1)
    assert chosen.tolist() == [[[0, 1, 2, 3, 4, 5, 6, -1, -1]]]


def test_group_rules():
    scores = torch.tensor([[[[1.0, 5.0], [4.0, 0.0]], [[2.0, 2.0], [6.0, 3.0]]]])
    assert combine_group(scores, "max").tolist() == [[[4, 5], [6, 3]]]
    assert combine_group(scores, "mean").tolist() == [[[2.5, 2.5], [4, 2.5]]]
    assert combine_group(scores, "each").tolist() == [[[1, 5], [4, 0], [2, 2], [6, 3]]]


def test_select_all_is_neutral():
    everything = SelectAll()
    assert everything.neutral
    assert not Quest(budget=64).neutral
    assert everything.summarize(torch.rand(3, 8, 4), torch.ones(3, 8).bool()).shape == (3, 0)
    with pytest.raises(ValueError, match=r"SelectAll\.budget"):
        everything.pages(32, 16)


def test_quest_is_a_value():
    assert Quest(budget=64) == Quest(budget=64, last=1)
    assert len({Quest(budget=64), Quest(budget=64), Quest(budget=65)}) == 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Quest(budget=64).last = 0


def rocketkv(query, keys, page, channels):
    """Scores of pages for one query head, as RocketKV has them before its softmax."""
    sign = [1.0 if x > 0 else -1.0 for x in query.tolist()]
    best = sorted(range(len(sign)), key=lambda c: -abs(float(query[c])))[:channels]
    found = []
    for first in range(0, len(keys), page):
        part = keys[first : first + page]
        largest = [max(sign[c] * float(k[c]) for k in part) for c in best]
        found.append(sum(sign[c] * float(query[c]) * x for c, x in zip(best, largest, strict=True)))
    return found


def test_top_channels_scores_pages_as_rocketkv_does():
    torch.manual_seed(3)
    keys, query, page = torch.randn(37, 12), torch.randn(12), 4
    padded = F.pad(keys, (0, 0, 0, 3)).view(-1, page, 12)
    counts = torch.tensor([4] * 9 + [1])
    for channels in (1, 5, 12):
        policy = TopChannels(budget=64, channels=channels)
        summary = policy.summarize(padded, torch.arange(page) < counts[:, None])
        scores = policy.score(query[None, None, None], summary[None, None], counts[None, None])
        wanted = torch.tensor(rocketkv(query, keys, page, channels))
        assert torch.allclose(scores[0, 0, 0], wanted, atol=1e-5)
    assert torch.allclose(
        scores, Quest(budget=64).score(query[None, None, None], summary[None, None], counts)
    )  # of all channels it is Quest's bound


def test_top_channels_of_a_group_are_chosen_together():
    """By the mean |q|; where the sum of queries is negative, by the smallest key."""
    query = torch.tensor([[1.0, -3.0, 0.1], [0.5, 2.0, 0.2]])
    keys = torch.tensor([[[1.0, 5.0, 9.0], [2.0, -5.0, 9.0]]])
    policy = TopChannels(budget=64, channels=2)
    summary = policy.summarize(keys, torch.ones(1, 2, dtype=torch.bool))
    scores = policy.score(query[None, None], summary[None, None], torch.tensor([[[2]]]))
    assert scores.flatten().tolist() == [1 * 2 + -3 * -5, 0.5 * 2 + 2 * -5]


def test_more_channels_than_a_key_has_are_refused():
    with pytest.raises(ValueError, match="channels: wanted at most 16 of a key, got 32"):
        TopChannels(budget=64).check(2, 2, 16)
    check_selection(TopChannels(budget=48, channels=5))
    check_selection(TopChannels(budget=48, channels=5, group="each", last=0))
