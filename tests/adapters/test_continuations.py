"""Many continuations of many contexts: each as if it were alone."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf import continuations as module
from kvpolicy.adapters.hf.continuations import continued
from tests.support.adapters.models import SIZES, pipelines, prompt

NAMES = ["none", *pipelines()]


def ids(length, seed):
    return tuple(prompt([length], seed=seed)["input_ids"][0].tolist())


CONTEXTS = [ids(n, seed) for seed, n in enumerate((40, 29, 2, 1))]
# One context twice, apart; a row that ends at once; contexts without a prompt.
ROWS = [
    (CONTEXTS[0], ids(3, 11)), (CONTEXTS[1], ()), (CONTEXTS[3], ids(21, 12)),
    (CONTEXTS[0], ids(6, 13)), (CONTEXTS[2], ids(2, 14)), (CONTEXTS[3], ()),
]  # fmt: skip


def pipeline(name):
    return CachePipeline(window=5) if name == "none" else pipelines()[name]


def by_hand(model, attached, context, more):
    """Logits `[1 + len(more), V]` of a cache of its own, its prompt ended, token by token."""
    cache = attached.new_cache()
    if len(context) > 1:
        model(torch.tensor([context[:-1]]), past_key_values=cache)
    cache.end_prompt()
    tokens = torch.tensor([*context[-1:], *more])
    logits = [model(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in tokens]
    return torch.stack(logits).log_softmax(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [2, 128])
def test_rows_are_as_alone(llama, monkeypatch, name, columns):
    monkeypatch.setattr(module, "COLUMNS", columns)
    plain = [
        llama(torch.tensor([context + more])).logits[0, len(context) - 1 :].log_softmax(-1)
        for context, more in ROWS
    ]
    moved = 0.0
    with attach(llama, pipeline(name), **SIZES) as attached:
        for (context, more), row, full in zip(ROWS, continued(attached, ROWS), plain, strict=True):
            wanted = by_hand(llama, attached, context, more)
            assert (row.last - wanted[-1]).abs().max() < 1e-4
            chosen = wanted[:-1].gather(-1, torch.tensor([more], dtype=torch.int64).T)[:, 0]
            assert row.chosen.shape == chosen.shape
            assert torch.allclose(row.chosen, chosen, atol=1e-4)
            assert row.best == tuple(wanted.argmax(-1).tolist())
            moved = max(moved, float((row.last - full[-1]).abs().max()))
    assert moved < 1e-4 if name == "none" else moved > 1e-1


@pytest.mark.parametrize("name", ["none", "snapkv", "all"])
def test_as_the_attachment_scores(llama, name):
    with attach(llama, pipeline(name), **SIZES) as attached:
        for row, (context, more) in zip(continued(attached, ROWS), ROWS, strict=True):
            if len(context) > 1:
                wanted = attached.loglikelihood(torch.tensor([context]), torch.tensor([[*more, 7]]))
                assert torch.allclose(torch.cat([row.chosen, row.last[7:8]]), wanted[0], atol=1e-4)


def test_caches_are_shown(llama):
    """Those of contexts once their prompts have ended, and those of rows that have none."""
    seen = []
    with attach(llama, pipeline("snapkv"), **SIZES) as attached:
        continued(attached, ROWS, read_to=lambda cache: seen.append(cache.report()))
        lengths = [len(CONTEXTS[row]) - 1 for row in (0, 1, 2)]
        assert [report.tokens for report in seen] == [sum(lengths), 21 + 2]
        alone = attached.read(torch.tensor([CONTEXTS[0][:-1]])).report()
        assert seen[0].evicted[0][0] >= alone.evicted[0][0] > 0


def test_padding_stores_nothing(llama):
    with attach(llama, pipeline("none"), **SIZES) as attached:
        continued(attached, ROWS)
        assert attached.last_report().tokens == 1 + 21 + 1
        continued(attached, ROWS[:2])
        assert attached.last_report().tokens == 40 + 3 + 29


def test_dtype_is_that_of_the_softmax(llama):
    with attach(llama.bfloat16(), pipeline("none"), **SIZES) as attached:
        assert continued(attached, ROWS)[0].last.dtype == torch.bfloat16
        row = continued(attached, ROWS, torch.float32)[0]
        assert row.last.dtype == row.chosen.dtype == torch.float32
        assert abs(row.last.exp().sum() - 1) < 1e-5
