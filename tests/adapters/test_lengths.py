"""How far a generation goes: lengths of every kind, and criteria that say another one."""

from __future__ import annotations

import contextlib
import math
import sys

import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteria

from kvpolicy import CachePipeline, RandomGate
from kvpolicy.adapters.hf import Request, attach, capture
from tests.support.adapters.models import SIZES, prompt, tiny
from tests.support.adapters.rehearsed import rehearsed

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using the model-agnostic default:UserWarning",
    "ignore:A custom stopping criteria:UserWarning",
)

PIPELINE = CachePipeline(window=5)
IDS = prompt([12])["input_ids"]
HUGE = (10**11, sys.maxsize - 100, int(1e30), 1e30, math.inf)  # 1e30: what tokenizers say


class After(StoppingCriteria):
    """Ends at a number of columns of its own."""

    def __init__(self, columns):
        self.columns = columns

    def __call__(self, ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= self.columns)


class Longer(MaxLengthCriteria):
    """Stands beside transformers' own, where it does not take its place."""


@pytest.fixture(scope="module")
def model():
    return tiny()


def check(model, ids=IDS, **options):
    """The same tokens, drawn ones too, and how many."""
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False} | options

    def run():
        torch.manual_seed(3)
        return model.generate(ids, **options)

    plain = run()
    with attach(model, PIPELINE, **SIZES):
        assert torch.equal(run(), plain)
    return plain.shape[1]


@pytest.mark.parametrize("sample", [False, True])
def test_criteria_that_are_longer_or_shorter(model, sample):
    for columns, more in ((40, {}), (40, {"max_new_tokens": 3}), (15, {"max_length": 30})):
        given = [MaxLengthCriteria(columns)]
        assert check(model, stopping_criteria=given, do_sample=sample, **more) == columns
    assert check(model, stopping_criteria=[MaxLengthCriteria(5)], do_sample=sample) == 13
    both = [MaxLengthCriteria(40), MaxLengthCriteria(36)]
    assert check(model, stopping_criteria=both, do_sample=sample) == 36
    assert check(model, stopping_criteria=[Longer(40)], do_sample=sample) == 32
    assert check(model, stopping_criteria=[MaxLengthCriteria(40.5)], do_sample=sample) == 41
    free = [MaxLengthCriteria(math.inf), After(35)]
    assert check(model, stopping_criteria=free, do_sample=sample) == 35


def test_criteria_of_other_loops(model):
    """Longer ones fail in plain transformers' beams, and never end its lookup."""
    assert check(model, stopping_criteria=[MaxLengthCriteria(25)], num_beams=2) == 25
    assert check(model, stopping_criteria=[MaxLengthCriteria(20)], prompt_lookup_num_tokens=3) >= 20


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"max_new_tokens": 6.0}, 18),
        ({"max_new_tokens": 7.5}, 20),
        ({"max_length": 18.0}, 18),
        ({"max_length": 17.2}, 18),
        ({"max_new_tokens": torch.tensor(6)}, 18),
    ],
)
@pytest.mark.parametrize("sample", [False, True])
def test_lengths_that_are_no_ints(model, options, columns, sample):
    assert check(model, do_sample=sample, **options) == columns


@pytest.mark.parametrize("most", HUGE)
@pytest.mark.parametrize("name", ["max_length", "max_new_tokens"])
def test_until_something_else_ends_it(model, name, most):
    ids = prompt([12, 12, 12])["input_ids"]
    assert check(model, ids, stopping_criteria=[After(20)], **{name: most}) == 20
    if most != int(1e30) or isinstance(most, float):  # plain lookup has no such tensors
        lookup = {"prompt_lookup_num_tokens": 3, name: most}
        assert check(model, stopping_criteria=[After(20)], **lookup) >= 20


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("most", [67, math.inf])
def test_buffers_grow(model, monkeypatch, captured, most):
    """With scores and a stream, over several growths; captured steps are rehearsed."""
    seen = []

    class Stream:
        def put(self, value):
            seen.append(value.flatten().tolist())

        def end(self):
            seen.append("end")

    def run(pipeline):
        options = {
            "max_new_tokens": most, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
            "return_dict_in_generate": True, "output_logits": True, "streamer": Stream(),
            "stopping_criteria": [After(12 + 67)],
        }  # fmt: skip
        seen.clear()
        with attach(model, pipeline, **SIZES) as attached:
            out = model.generate(IDS, **options)
            decoding = attached.decoding.split(":")[0]
        return out.sequences, torch.cat(out.logits), out.past_key_values, decoding, list(seen)

    pipeline = CachePipeline(admission=RandomGate(sparsity=0.3), window=5)
    sequences, logits, cache, decoding, told = run(pipeline)
    assert decoding == "eager"
    monkeypatch.setattr(capture, "AHEAD", 8)
    with rehearsed() if captured else contextlib.nullcontext():
        found = run(pipeline)
    assert found[3] == ("captured" if captured else "eager")
    assert found[2].captures >= 2 * captured  # anew where tables grew
    assert sequences.shape[1] == 12 + 67 and torch.equal(found[0], sequences)
    assert torch.equal(found[1], logits) and found[4] == told
    assert found[2].state.lengths == cache.state.lengths == [12 + 66]
    widths = [x.state.layers[0].table.shape[2] for x in (found[2], cache)]
    assert widths[0] <= widths[1]


def test_one_of_many_requests(model):
    with attach(model, PIPELINE, **SIZES) as attached:
        requests = [Request(IDS[0], id=n, max_new_tokens=n) for n in (6.0, 7.5)]
        found = {x.request.id: x.tokens for x in attached.generate_many(requests)}
    assert [len(found[n]) for n in (6.0, 7.5)] == [6, 8]
