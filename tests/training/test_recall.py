"""Sequences of the recall mix: what is asked stands in the text, in no words of the evaluation."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch

from kvpolicy.evaluation.models import tiny_tokenizer
from kvpolicy.evaluation.tasks import words
from kvpolicy.training import TrainingMix, tasks, train_write_gate
from kvpolicy.training.data import MIX, MIXES, RECALL_MIX
from tests.support.training.small import TEXT, make_model, make_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROSE = " ".join("".join(random.Random(n).choices(LETTERS, k=3 + n % 6)) for n in range(4000))


def answers(ids, mask):
    """The text before the first answer, and all answers."""
    runs = itertools.groupby(zip(mask, ids, strict=True), key=lambda x: x[0])
    found = ["".join(chr(token) for _, token in run) for told, run in runs if told]
    return "".join(map(chr, ids[: mask.index(True)] if any(mask) else ids)), found


def test_a_tables_answers_are_its_values():
    mix = TrainingMix(texts=[PROSE], tokenizer=tiny_tokenizer(), length=4096, kinds={"tables": 1})
    rng, asked = random.Random(0), 0
    for _ in range(20):
        ids, mask = mix.sequence("tables", rng)
        assert len(ids) == len(mask) == 4096
        text, found = answers(ids, mask)
        for answer in found:
            value = answer.rstrip(".").split(": ")[-1].removeprefix("It is ")
            assert value in text
            asked += 1
    assert asked > 60


def test_places_are_those_that_were_said():
    for seed in range(30):
        task = tasks.make("places", random.Random(seed))
        towns = [town for town in tasks._CITIES.split() if any(town in x for x in task.inserts)]
        assert len(task.inserts) == len(task.questions) == len(towns) >= 4
        for question, answer in task.questions:
            (said,) = [x for x in task.inserts if _who(x) in question]
            town = next(t for t in towns if t in answer)
            assert re.search(rf"\b{town}\b", said)


def _who(said):
    return next(
        f"{a} {b}"
        for a in tasks._GIVEN.split()
        for b in tasks._FAMILY.split()
        if f"{a} {b}" in said
    )


def test_no_word_of_the_evaluation_is_trained_on():
    known = " ".join(
        value for name, value in vars(tasks).items() if name.startswith("_") and type(value) is str
    )
    trained = set(known.split())
    people = {part for name in words.PEOPLE for part in name.split()}
    assert not trained & {*people, *words.CITIES, *words.COLOURS, *words.THINGS}
    forms = [*tasks._ROWS, *(x for row in (*tasks._PLACED, *tasks._SAID) for x in row)]
    assert not [x for x in forms if "lives in" in x or "In which city" in x or '"{k}": "{v}"' in x]


def test_mixes_are_shares():
    assert all(sum(mix.values()) == pytest.approx(1) for mix in MIXES.values())
    assert set(RECALL_MIX) == set(MIX) | {"places", "tables"}


def test_a_training_takes_the_mix_by_name(monkeypatch):
    seen = []
    sequence = TrainingMix.sequence
    monkeypatch.setattr(
        TrainingMix,
        "sequence",
        lambda self, kind, rng: seen.append(kind) or sequence(self, kind, rng),
    )
    told = {"steps": 12, "window": 8, "lam": 0.1, "length": 128, "batch_size": 2}
    for mix, wanted in (("recall", {"places", "tables"}), ("default", set())):
        seen.clear()
        torch.manual_seed(0)
        train_write_gate(make_model(), [TEXT], tokenizer=make_tokenizer(), mix=mix, **told)
        assert set(seen) & {"places", "tables"} == wanted
    with pytest.raises(ValueError, match="mix"):
        train_write_gate(make_model(), [TEXT], tokenizer=make_tokenizer(), mix="other", **told)
