"""Questions in slots get what each gets by itself on a fork of its context."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import TOVA, CachePipeline, PhaseError, UnsupportedError, attach
from kvpolicy.adapters.hf import Request
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

PIPELINES = pipelines()
CONTEXTS, QUESTIONS = [23, 31], [[7, 8, 9], [50], [11, 12], [90, 3, 4, 5]]
ROWS, NEW = [1, 0, 1, 1], [6, 1, 9, 4]


def asked(**more):
    return [
        Request(ids, id=number, max_new_tokens=new, do_sample=False, **more)
        for number, (ids, new) in enumerate(zip(QUESTIONS, NEW, strict=True))
    ]


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("gate-quest-snapkv", 2),
        *(pytest.param(n, 4, marks=pytest.mark.slow) for n in ("gate", "quest", "snapkv")),
    ],
)
def test_answers_are_those_of_ask(name, slots) -> None:
    model = tiny()
    with attach(model, PIPELINES[name], **SIZES) as attached:
        cache = attached.read(**prompt(CONTEXTS))
        alone = [
            attached.ask(
                cache.fork([row]), torch.tensor([ids]), max_new_tokens=new, do_sample=False
            )[0, len(ids) :].tolist()
            for row, ids, new in zip(ROWS, QUESTIONS, NEW, strict=True)
        ]
        before = cache.report()
        found = {x.id: x for x in attached.ask_many(cache, asked(), rows=ROWS, slots=slots)}
        assert [found[n].tokens for n in range(4)] == alone
        assert all(found[n].held.tokens > CONTEXTS[row] for n, row in enumerate(ROWS))
        assert cache.report().stored == before.stored
        again = attached.ask(cache.fork([1]), torch.tensor([[7, 8, 9]]), max_new_tokens=6)
        assert again[0, 3:].tolist() == alone[0]
        assert cache.report().pages == before.pages


def test_what_it_refuses() -> None:
    model = tiny(layers=1)
    with attach(model, CachePipeline(window=5), **SIZES) as attached:
        cache = attached.read(**prompt(CONTEXTS))
        with pytest.raises(TypeError, match="rows: wanted which of the cache's 2"):
            attached.ask_many(cache, asked())
        with pytest.raises(ValueError, match="rows: wanted sequences from 0 below 2, got 2"):
            attached.ask_many(cache, asked(), rows=[0, 1, 2, 0])
        with pytest.raises(ValueError, match="rows: wanted one for each of 4 requests, got 1"):
            attached.ask_many(cache, asked(), rows=[0])
        with pytest.raises(TypeError, match="requests: wanted a list of Request"):
            attached.ask_many(cache, iter(asked()), rows=ROWS)
        with pytest.raises(PhaseError, match="prompt has not ended"):
            attached.ask_many(attached.new_cache(), asked())
    late = CachePipeline(eviction=TOVA(budget=14), window=5)
    with (
        attach(model, late, **SIZES) as attached,
        pytest.raises(UnsupportedError, match="ask_many: evictions act between"),
    ):
        attached.ask_many(attached.read(**prompt([23])), asked())
