"""Every way to stretch RoPE that transformers knows, end to end: the plain model's logits."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach
from tests.support.adapters.dense import Dense, follow
from tests.support.adapters.models import SIZES, error, pipelines, prompt, tiny
from tests.support.adapters.rehearsed import Rehearsed, rehearsed

GREEDY = {
    "max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True
}  # fmt: skip
SHORT = 16  # positions before it is stretched; prompts and answers cross them
FACTORS = {
    "short_factor": [1.0 + n / 20 for n in range(8)],
    "long_factor": [1.0 + n for n in range(8)],
}
TYPES = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": SHORT,
    },
    "longrope": {**FACTORS, "factor": 4.0, "original_max_position_embeddings": SHORT},
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip
CHANGES = ("dynamic", "longrope")  # with the length, so that a step differs from a prompt


def stretched(name):
    rope = {"rope_type": name, "rope_theta": 1e4, **TYPES[name]}
    most = SHORT if name == "dynamic" else 512
    return tiny(rope_parameters=rope, max_position_embeddings=most)


def test_every_type_is_here():
    assert set(ROPE_INIT_FUNCTIONS) <= {"default", *TYPES}


FOUND = sorted(set(TYPES) & set(ROPE_INIT_FUNCTIONS))


@pytest.fixture(
    params=[x if x == "yarn" else pytest.param(x, marks=pytest.mark.slow) for x in FOUND]
)
def roped(request):
    return request.param, stretched(request.param)


@torch.no_grad()
def test_generate_chunks_and_forwards(roped):
    """The whole prompt, one in chunks that plain reads so too, and steps of one's own."""
    name, model = roped
    inputs = prompt([20, 11])
    plain = model.generate(**inputs, **GREEDY)
    assert error(plain, tiny(max_position_embeddings=512).generate(**inputs, **GREEDY)) > 1e-2
    chunked = {**GREEDY, "prefill_chunk_size": 6}
    parts = model.generate(**inputs, **chunked)
    row = inputs["input_ids"][:1]
    past = model(row[:, :13]).past_key_values
    after = model(row[:, 13:], past_key_values=past).logits
    with attach(model, CachePipeline(window=5), **SIZES) as attached:
        for wanted, options in ((plain, GREEDY), (parts, chunked)):
            ours = model.generate(**inputs, **options)
            assert torch.equal(ours.sequences, wanted.sequences) and error(ours, wanted) < 1e-3
        cache = attached.new_cache()
        model(row[:, :13], past_key_values=cache)
        assert (model(row[:, 13:], past_key_values=cache).logits - after).abs().max() < 1e-3
        with rehearsed():  # what a captured step would compute
            ours = model.generate(**inputs, **GREEDY)
        if name not in CHANGES:
            assert attached.decoding == "captured" and error(ours, plain) < 1e-3


@torch.no_grad()
def test_a_step_that_cannot_be_captured_decodes_eagerly(monkeypatch):
    """As where frequencies that change with the length ask the device."""
    model, inputs = stretched("dynamic"), prompt([20, 11])
    plain = stretched("dynamic").generate(**inputs, **GREEDY)  # frequencies stay at the longest
    with attach(model, CachePipeline(window=5), **SIZES) as attached, rehearsed():
        monkeypatch.setattr(Rehearsed, "fails", True)
        ours = model.generate(**inputs, **GREEDY)
        assert attached.decoding.startswith("eager: the capture failed at ")
    assert torch.equal(ours.sequences, plain.sequences) and error(ours, plain) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yarn", "llama3", "linear"])
@torch.no_grad()
def test_policies_on_stretched_keys(name):
    """Beside the oracle, which keeps all keys and masks them."""
    model, pipeline = stretched(name), pipelines()["gate-quest-snapkv"]
    ids = prompt([33])["input_ids"]
    with attach(model, pipeline, **SIZES):
        out = model.generate(ids, **GREEDY)
    wanted = follow(Dense(model, pipeline, **SIZES), ids[0], out.sequences[0, 33:])
    assert (torch.cat(out.logits) - wanted).abs().max() < 2e-3
