"""Evictions that score by keys, positions or the newest query, against their originals' own code.

The kept sets were recorded from NVIDIA/kvpress's presses, run on the same sines in float64 with the
last token forced in, which a window always keeps; TOVA's while decoding from the rule of
schwartz-lab-NLP/TOVA: after every step the token of least mean weight goes.
"""

from __future__ import annotations

import pytest
import torch

from kvpolicy import TOVA, KeyDiff, Knorm, LagKV, QFilters, RandomGate, Ratio, StreamingLLM
from kvpolicy._files import write_safetensors
from kvpolicy.testing import check_eviction
from tests.support.sines import KEY, QUERY, T, kept, waves

HELD = 16
KNORM = [
    [3, 4, 8, 9, 13, 18, 21, 23, 27, 28, 32, 33, 37, 38, 43, 47],
    [0, 4, 8, 9, 13, 18, 19, 23, 32, 33, 35, 37, 38, 42, 43, 47],
]
KEYDIFF = [
    [0, 5, 10, 13, 16, 22, 26, 29, 30, 32, 37, 42, 44, 45, 46, 47],
    [2, 4, 7, 9, 10, 13, 23, 26, 32, 33, 35, 42, 43, 45, 46, 47],
]
TOVA_MEAN = [
    [2, 5, 9, 11, 12, 19, 23, 26, 29, 32, 33, 34, 40, 45, 46, 47],
    [2, 4, 5, 9, 10, 12, 22, 23, 25, 26, 30, 36, 40, 44, 45, 47],
]
TOVA_MAX = [
    [0, 2, 5, 9, 11, 12, 19, 23, 26, 29, 32, 33, 34, 40, 46, 47],
    [1, 2, 4, 5, 9, 10, 12, 23, 25, 26, 30, 36, 40, 44, 45, 47],
]
Q_FILTERS = [
    [6, 7, 11, 16, 17, 19, 20, 30, 33, 35, 37, 38, 39, 43, 44, 47],
    [1, 4, 7, 8, 9, 10, 13, 15, 19, 23, 25, 32, 33, 35, 45, 47],
]
# 28 tokens, so that no tie of ranks lies at the border.
LAG_4 = [
    [0, 1, 2, 3, 5, 8, 10, 12, 13, 15, 17, 19, 22, 23, 25, 29, 30, 31, 33, 37, 38, 39, 41],
    [0, 1, 2, 3, 6, 8, 10, 12, 13, 15, 17, 19, 21, 25, 26, 28, 29, 32, 34, 35, 37, 39, 41],
]
LAG_4_CROSS = [
    [0, 1, 2, 3, 5, 8, 11, 12, 13, 17, 19, 22, 23, 25, 29, 30, 33, 35, 37, 38, 39, 40, 41],
    [0, 1, 2, 3, 6, 8, 10, 12, 13, 15, 17, 19, 21, 25, 26, 28, 29, 32, 34, 35, 37, 39, 41],
]
LAG_8 = [[0, 1, 2, 5, 6, 10, 11, 15, 16, 20, 25, 26, 30, 31, 34]] * 2
LAG_8_CROSS = [
    [0, 1, 2, 5, 6, 10, 11, 12, 15, 16, 20, 25, 26, 30, 34],
    [0, 1, 2, 5, 6, 10, 11, 15, 16, 17, 20, 25, 26, 30, 31],
]
TOVA_LAYER = [2, 5, 9, 10, 12, 19, 23, 25, 26, 30, 32, 33, 40, 44, 45, 47]


@pytest.mark.parametrize("cuts", [1, 5])
@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (Knorm(budget=HELD), KNORM),
        (KeyDiff(budget=HELD), KEYDIFF),
        (TOVA(budget=HELD), TOVA_MEAN),
        (TOVA(budget=HELD, group="max"), TOVA_MAX),
        (TOVA(budget=HELD, across_heads=True), [TOVA_LAYER, TOVA_LAYER]),
        (QFilters(budget=HELD, filters=waves(0.7, 2)[None, :, 5]), Q_FILTERS),
        (StreamingLLM(budget=HELD), [[0, 1, 2, 3, *range(36, T)]] * 2),
        (StreamingLLM(budget=Ratio(1 / 3), sinks=0), [[*range(32, T)]] * 2),
    ],
    ids=repr,
)
def test_the_prompt_is_kept_as_the_original_does(policy, wanted, cuts):
    assert kept(policy, cuts=cuts) == wanted


@pytest.mark.parametrize(
    ("lag", "cross", "wanted"),
    [(4, False, LAG_4), (4, True, LAG_4_CROSS), (8, False, LAG_8), (8, True, LAG_8_CROSS)],
)
def test_lagkv(lag, cross, wanted):
    """Sinks, the last partition and what follows it stay; of 48 tokens 28 do."""
    found = kept(LagKV(budget=28, lag=lag, sinks=3, cross_scoring=cross))
    assert found == [[*head, *range(T - 28 + len(head), T)] for head in wanted]


def test_lagkv_of_less_than_two_partitions_keeps_the_newest():
    assert kept(LagKV(budget=20, lag=23, sinks=3)) == [[0, 1, 2, *range(31, T)]] * 2


def test_filters_of_a_file_are_the_same(tmp_path):
    made = QFilters(budget=HELD, filters=waves(0.7, 2)[None, :, 5])
    made.save(tmp_path / "model.safetensors")
    again = QFilters.from_pretrained(tmp_path, "model.safetensors", budget=HELD)
    assert torch.equal(again.filters, made.filters) and kept(again) == Q_FILTERS
    with pytest.raises(ValueError, match=r"filters: wanted \[L, Hkv, D\] = \[3, 2, 8\]"):
        again.check(3, 2, 8)
    write_safetensors(tmp_path / "other.safetensors", {"other": made.filters}, {})
    with pytest.raises(ValueError, match="wanted the key q_filters, got other"):
        QFilters.from_pretrained(tmp_path / "other.safetensors", budget=HELD)


def test_tova_drops_a_token_at_every_step():
    found = kept(TOVA(budget=12, across_heads=True), prompt=40)
    assert found == [[3, 10, 11, 24, 25, 38, 40, 43, 44, 45, 46, 47]] * 2


def test_streaming_goes_on_while_tokens_are_generated():
    assert kept(StreamingLLM(budget=10), prompt=20) == [[0, 1, 2, 3, *range(42, T)]] * 2
    stays = kept(StreamingLLM(budget=10, when="prompt_end"), prompt=20)
    assert stays == [[0, 1, 2, 3, *range(14, T)]] * 2


def test_heads_that_hold_other_tokens_share_what_they_have():
    """Behind an admission a head's missing token counts as weight 0 for the layer's mean."""
    gate = RandomGate(sparsity=0.5, seed=4)
    held = kept(StreamingLLM(budget=T), admission=gate)  # all that is admitted
    found = kept(TOVA(budget=8, across_heads=True), admission=gate)
    weights = torch.zeros(2, T, dtype=torch.float64)
    for head, tokens in enumerate(held):
        logits = QUERY[2 * head : 2 * head + 2, -1] @ KEY[head, tokens].T * 8**-0.5
        weights[head, tokens] = logits.softmax(-1).mean(0)
    mean = weights.mean(0)
    for head, tokens in enumerate(held):
        best = sorted(tokens[:-1], key=lambda n: -mean[n])[:7]
        assert found[head] == [*sorted(best), T - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "policy",
    [
        StreamingLLM(budget=48),
        TOVA(budget=48),
        TOVA(budget=48, group="max", across_heads=True),
        KeyDiff(budget=48),
        KeyDiff(budget=48, when="decode"),
        Knorm(budget=48),
        LagKV(budget=48, lag=8),
        LagKV(budget=24, lag=8, cross_scoring=True, when="decode"),
        QFilters(budget=48, filters=torch.linspace(-1, 1, 64).view(2, 2, 16)),
    ],
    ids=repr,
)
def test_the_contract_holds(policy, dtype):
    check_eviction(policy, dtype=dtype)
