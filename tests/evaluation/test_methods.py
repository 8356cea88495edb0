"""The list of methods: each at the size it was asked for, whatever its heads hold."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")


from kvpolicy.evaluation.grid import cell, methods, runner
from kvpolicy.evaluation.grid.variants import FULL, SEEN, Room
from kvpolicy.evaluation.models import tiny_llama
from kvpolicy.evaluation.tasks.prompts import Example, Question
from tests.support.evaluation.small import small_gate

LENGTH, ASKED, PAGE = 640, 20, 8
VARIANTS = methods.method_variants([0.4], 32, gate=small_gate())
NAMES = [x.name for x in VARIANTS]
# One of a kind; the slow suite takes all.
SOME = {"full", "SnapKV 0.4", "AdaKV, question seen 0.4", "H2O 0.4", "RocketKV 0.4", "FastGen 0.4"}


def each(tuned):
    """Names of variants with a budget, or of those whose number is searched for."""
    names = [x.name for x in VARIANTS if x.tuned == tuned and not (tuned and SEEN in x.name)]
    return [pytest.param(x, marks=() if x in SOME else pytest.mark.slow) for x in names]


@pytest.fixture(scope="module")
def example():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 512, (LENGTH + ASKED,), generator=generator).tolist()
    question = Question(tuple(ids[LENGTH:-1]), tuple(ids[-1:]))
    return Example(context_ids=tuple(ids[:LENGTH]), questions=(question,))


@pytest.mark.parametrize("name", each(tuned=False))
def test_every_method_takes_the_bytes_that_it_is_given(name, example):
    variant = next(x for x in VARIANTS if x.name == name)
    room = Room(variant.keep * LENGTH, LENGTH + ASKED, ASKED, page=PAGE)
    pipeline = variant.build(room)
    found = cell.answer(
        tiny_llama(), pipeline, [example], question_in_prompt=variant.question_in_prompt,
        captured=False, page_size=PAGE,
    ).footprint  # fmt: skip
    frees = variant.family not in (FULL, "XAttention") and methods.READING not in name
    slots = room.slots if frees else LENGTH + ASKED
    assert found.slots == pytest.approx(slots, abs=2 * PAGE)
    if methods.READING in name:
        assert found.read_tokens == pytest.approx(room.slots, abs=PAGE)


@pytest.mark.parametrize("name", each(tuned=True))
def test_a_number_is_searched_for_where_there_is_no_budget(name, example):
    variant, model = next(x for x in VARIANTS if x.name == name), tiny_llama()
    room = Room(variant.keep * LENGTH, LENGTH + ASKED, ASKED, page=PAGE)
    run = runner.Runner(
        model=model, tokenizer=None, text="", contexts=1, seed=0, deadline=0.0, store=None,
        results=[], page_size=PAGE,
    )  # fmt: skip
    pipeline = run._tuned(variant.build(room), room, [example])
    found = cell.answer(model, pipeline, [example], page_size=PAGE, captured=False).footprint
    # What one number turns may have steps: of layers as a whole, of sets of tokens.
    steps = {"SimLayerKV": 0.5, "FastGen": 0.35, "DBudgetKV": 0.25}.get(variant.family, 0.1)
    assert found.slots == pytest.approx(room.slots, rel=steps)


def test_a_size_below_the_window_is_skipped():
    room = Room(20, LENGTH + ASKED, ASKED, page=PAGE)
    none = [x.name for x in VARIANTS if x.build(room) is None]
    assert {"SnapKV 0.4", "AdaKV 0.4", "FastGen 0.4", "Quest (reads) 0.4"} <= set(none)


def test_names_are_of_the_page_and_each_stands_once():
    assert len(NAMES) == len(set(NAMES)) and NAMES[0] == FULL
    assert sum(SEEN in name for name in NAMES) == len(methods.EVICTIONS)
    twice = methods.method_variants([0.4, 0.2], 32)
    assert len(twice) == 2 + 2 * (len(VARIANTS) - 3)  # full, XAttention; this has a gate beside
