"""The conformance kit rejects broken selections by the name of what they break."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import Quest, SelectAll, Tokens
from kvpolicy.selection import Selection
from kvpolicy.testing import ConformanceError, check_selection


def mean_key(self, keys, valid):
    return keys.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


def dot(self, query, summary, counts):
    return torch.einsum("bhgd,bhmd->bhgm", query, summary)


def summary_of_invalid_slots(self, keys, valid):
    return keys.mean(1)


def summary_in_place(self, keys, valid):
    return keys.masked_fill_(~valid[..., None], 0).sum(1)


def summary_of_the_batch(self, keys, valid):
    return mean_key(self, keys, valid) - mean_key(self, keys, valid).mean(0)


def summary_of_three_dims(self, keys, valid):
    return mean_key(self, keys, valid)[:, None]


def score_by_place(self, query, summary, counts):
    return dot(self, query, summary, counts) + torch.arange(summary.shape[2])


def score_by_other_pages(self, query, summary, counts):
    return dot(self, query, summary, counts).softmax(-1)


def score_by_other_sequences(self, query, summary, counts):
    return dot(self, query, summary, counts) - query.mean()


def score_by_other_heads(self, query, summary, counts):
    return (
        dot(self, query, summary, counts).mean(1, keepdim=True).expand(-1, query.shape[1], -1, -1)
    )


def score_of_nan(self, query, summary, counts):
    return dot(self, query, summary, counts) / (counts > 1)[:, :, None] * (counts > 1)[:, :, None]


def score_without_group(self, query, summary, counts):
    return dot(self, query, summary, counts).amax(2)


def score_of_ints(self, query, summary, counts):
    return dot(self, query, summary, counts).round().long()


def score_with_item(self, query, summary, counts):
    return dot(self, query, summary, counts) + 0 * int(counts.max())


def reads_everything(self, window, page_size):
    return 10**6


MEAN = {"budget": Tokens(40), "summarize": mean_key, "score": dot}


def test_mean_key_passes():
    check_selection(attrs.frozen(type("MeanKey", (Selection,), MEAN))())


@pytest.mark.parametrize(
    ("members", "rule"),
    [
        ({"summarize": summary_of_invalid_slots}, "invalid slots"),
        ({"summarize": summary_in_place}, "inputs unchanged"),
        ({"summarize": summary_of_the_batch}, "batch"),
        ({"summarize": summary_of_three_dims}, "shape"),
        ({"score": score_by_place}, "page order"),
        ({"score": score_by_other_pages}, "other pages"),
        ({"score": score_by_other_sequences}, "batch"),
        ({"score": score_by_other_heads}, "heads"),
        ({"score": score_of_nan}, "no NaN"),
        ({"score": score_without_group}, "shape"),
        ({"score": score_of_ints}, "dtype"),
        ({"score": score_with_item}, "no host sync"),
        ({"pages": reads_everything}, "budget"),
        ({"group": "median"}, "options"),
        ({"first": -1}, "options"),
    ],
    ids=lambda x: getattr(next(iter(x.values())), "__name__", str(x)) if isinstance(x, dict) else x,
)
def test_broken_selection_is_rejected(members, rule):
    policy = attrs.frozen(type("Broken", (Selection,), {**MEAN, **members}))()
    with pytest.raises(ConformanceError, match=f"^Broken breaks '{rule}': wanted"):
        check_selection(policy)


def test_unsound_summary_is_rejected():
    policy = attrs.frozen(type("Unsound", (Selection,), MEAN))()
    with pytest.raises(ConformanceError, match="^Unsound breaks 'upper bound': wanted"):
        check_selection(policy, upper_bound=True)


def test_fused_op_that_is_not_the_score_is_rejected():
    @attrs.frozen(kw_only=True)
    class Smallest(Quest):
        def score(self, query, summary, counts):
            return -Quest.score(self, query, summary, counts)

    with pytest.raises(ConformanceError, match="^Smallest breaks 'fused': wanted"):
        check_selection(Smallest(budget=40))


def test_selection_without_effect_is_rejected():
    with pytest.raises(ConformanceError, match="^SelectAll breaks 'takes effect': wanted"):
        check_selection(SelectAll(), takes_effect=True)
