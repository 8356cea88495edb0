"""The conformance kit rejects broken evictions by the name of what they break."""

from __future__ import annotations

import itertools

import attrs
import pytest
import torch

from kvpolicy import Tokens
from kvpolicy.eviction import Eviction
from kvpolicy.testing import ConformanceError, check_eviction

CALLS = itertools.count()


def norms(view):
    return view.keys.norm(dim=-1)


def score_nan(self, view):
    return norms(view) / view.valid


def score_inf(self, view):
    return torch.where(view.positions < 4, float("inf"), norms(view))


def score_without_heads(self, view):
    return norms(view).mean(1)


def score_bools(self, view):
    return view.valid


def score_in_place(self, view):
    return view.keys.mul_(2).norm(dim=-1)


def score_with_state(self, view):
    return norms(view) + next(CALLS)


def score_padding(self, view):
    return norms(view) - norms(view).mean(-1, keepdim=True)


def score_by_slot_count(self, view):
    return norms(view) * view.valid.shape[-1]


def score_invalid_queries(self, view):
    return norms(view) + view.queries.mean((1, 2, 3))[:, None, None]


def score_by_the_batch(self, view):
    return norms(view) / view.lengths.max()


def score_by_other_heads_too(self, view):
    return norms(view) + (view.valid * norms(view)).amax((1, 2), keepdim=True)


def score_of_other_shapes(self, view):
    return view.keys @ view.keys


def score_norm(self, view):
    return norms(view)


def scores_of_another_kind(self, ops, stored):
    return -norms(stored.view())


def mark_ahead(self, write):
    return write.key[..., 0].roll(-1, 1) > 0


def number_by_cut(self, write):
    return write.key.norm(dim=-1) - write.key.norm(dim=-1).amax(1, keepdim=True)


def number_from_the_calls_start(self, write):
    starts, at = write.cu_seqlens[:-1], torch.arange(len(write.positions))
    since = at - starts[torch.searchsorted(write.cu_seqlens[1:], at.int(), right=True)]
    return since.float().expand(write.key.shape[0], -1)


def score_with_queries_that_count_already(self, view):
    logits = view.queries.unflatten(1, (view.keys.shape[1], -1)).mean(2) @ view.keys.mT
    return view.numbers + logits.exp().sum(2)


def score_by_statistics_that_were_not_asked_for(self, view):
    return norms(view) + view.query_stats.mean[:, : view.keys.shape[1], :1]


def score_by_queries_that_were_not_asked_for(self, view):
    return norms(view) + view.queries.sum()


def score_otherwise_where_rope_is_known(self, view):
    return norms(view) if view.rope is None else -norms(view)


def score_by_numbers_that_were_not_asked_for(self, view):
    return view.numbers


def score_by_all_rows_of_hidden(self, view):
    return norms(view) + view.hidden.mean((1, 2))[:, None, None]


def score_by_statistics_of_all_sequences(self, view):
    return norms(view) + view.query_stats.tokens.max()


def score_by_the_whole_output_projection(self, view):
    return norms(view) * view.output_weight.norm()


def score_with_all_keys(self, view):
    return norms(view) + view.keys.masked_fill(~view.valid[..., None], 0).sum((2, 3))[..., None]


def scores_of_padding_too(self, ops, stored):
    k, _, _ = ops.read_pages(stored.pages, stored.heads.table)
    k = k.flatten(2, 3)
    return k.norm(dim=-1) + k.sum((2, 3))[:, :, None]


def number_bools(self, write):
    return write.key[..., 0] > 0


@attrs.frozen
class Lenient(Tokens):
    def keep(self, scores, valid, target, window, best):
        return best(scores, valid, target + 3)


NORM = {"budget": Tokens(40), "score": score_norm}


def test_norm_passes():
    check_eviction(attrs.frozen(type("Norm", (Eviction,), NORM))())


@pytest.mark.parametrize(
    ("members", "rule"),
    [
        ({"score": score_nan}, "no NaN"),
        ({"score": score_inf}, "no NaN"),
        ({"score": score_without_heads}, "shape"),
        ({"score": score_bools}, "dtype"),
        ({"score": score_in_place}, "inputs unchanged"),
        ({"score": score_with_state}, "stateless"),
        ({"score": score_padding}, "invalid slots"),
        ({"score": score_by_slot_count}, "invalid slots"),
        ({"score": score_invalid_queries, "queries": 32}, "invalid slots"),
        ({"score": score_by_the_batch}, "batch"),
        ({"score": score_by_other_heads_too}, "heads"),
        ({"score": score_of_other_shapes}, "runs"),
        ({"scores": scores_of_another_kind}, "fused"),
        ({"scores": scores_of_padding_too, "score": score_with_all_keys}, "fused"),
        ({"score": score_by_statistics_that_were_not_asked_for}, "asks"),
        ({"score": score_by_queries_that_were_not_asked_for}, "asks"),
        ({"score": score_otherwise_where_rope_is_known}, "asks"),
        ({"score": score_by_numbers_that_were_not_asked_for}, "asks"),
        ({"score": score_by_all_rows_of_hidden, "hidden": 32}, "invalid slots"),
        ({"score": score_by_statistics_of_all_sequences, "query_stats": True}, "batch"),
        ({"score": score_by_the_whole_output_projection, "output_weight": True}, "heads"),
        ({"mark": mark_ahead}, "causal"),
        ({"number": number_by_cut, "numbered": True}, "causal"),
        ({"number": number_from_the_calls_start, "numbered": True}, "cut"),
        (
            {
                "score": score_with_queries_that_count_already,
                "queries": 8,
                "accumulates": "sum",
                "remembers": True,
            },
            "counted once",
        ),
        ({"number": number_bools, "numbered": True}, "dtype"),
        ({"accumulates": "mean"}, "options"),
        ({"accumulates": "sum", "group": "each"}, "options"),
        ({"when": "sometimes"}, "options"),
        ({"needs": {"key_pre"}}, "needs"),
        ({"budget": Lenient(40)}, "budget"),
        ({"budget": None}, "takes effect"),
        ({"neutral": True}, "takes effect"),
    ],
    ids=lambda x: getattr(next(iter(x.values())), "__name__", str(x)) if isinstance(x, dict) else x,
)
def test_broken_eviction_is_rejected(members, rule):
    policy = attrs.frozen(type("Broken", (Eviction,), {**NORM, **members}))()
    with pytest.raises(ConformanceError, match=f"^Broken breaks '{rule}': wanted"):
        check_eviction(policy, takes_effect=True)
