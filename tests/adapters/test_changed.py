"""A model that is changed while a pipeline is attached: refused by name, or followed."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import GenerationMixin

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, prompt, tiny

IDS = prompt([12])["input_ids"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def skip(model):
    model.model.layers[1].forward = lambda hidden, *args, **kwargs: hidden


def drop(model):
    del model.model.layers[1]


def repeat(model):
    model.model.layers[1] = model.model.layers[0]


def repeat_attention(model):
    model.model.layers[1].self_attn = model.model.layers[0].self_attn


def replace(model):
    model.model.layers[1] = tiny(seed=1).model.layers[1]


def replace_attention(model):
    other = tiny(seed=1)
    other.set_attn_implementation("eager")
    model.model.layers[0].self_attn = other.model.layers[0].self_attn


def replace_decoder(model):
    model.model = tiny(seed=1).model


def keys_for_values(model):
    attention = model.model.layers[0].self_attn
    update = type(attention).forward

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        class Twice:
            def update(self, key, value, layer):
                keys, _ = past_key_values.update(key, value, layer)
                return keys, keys

        return update(self, hidden_states, past_key_values=Twice(), **kwargs)

    attention.forward = types.MethodType(forward, attention)


@pytest.mark.parametrize(
    "change, said",
    [
        (skip, r"layers: \[1\] of the attached model did not run"),
        (drop, r"layers: \[1\] of the attached model did not run"),
        (repeat, r"^layers: \[0\] of the attached model ran twice"),
        (repeat_attention, r"^layers: \[0\] of the attached model ran twice"),
        (replace, r"^layers: \[1\] of the attached model attend by another attention"),
        (replace_attention, r"^layers: \[0\] of the attached model attend by another attention"),
        (replace_decoder, "^layers: the decoder of LlamaForCausalLM was replaced"),
        (keys_for_values, "value: a layer attends to other values"),
        (lambda x: x.set_attn_implementation("eager"), "attn_implementation: set to 'eager'"),
        (lambda x: x.set_attn_implementation("sdpa"), "attn_implementation: set to 'sdpa'"),
    ],
)
def test_what_changes_what_attach_saw_is_refused(change, said):
    model = tiny()
    with attach(model, CachePipeline(window=5), **SIZES) as attached:
        cache = attached.read(IDS)
        before = digest(cache)
        change(model)
        for call in (
            lambda: model(IDS),
            lambda: model.generate(IDS, **GREEDY),
            lambda: model(IDS[:, :3], past_key_values=cache),
        ):
            with pytest.raises(UnsupportedError, match=said):
                call()
        assert digest(cache) == before


def test_a_generate_that_is_patched_is_called(monkeypatch):
    """As instruments do it, before attach and while attached, without the names of arguments."""
    model, calls = tiny(), []
    whole = GenerationMixin.generate

    def counted(self, *args, **kwargs):
        calls.append(1)
        return whole(self, *args, **kwargs)

    wanted = model.generate(IDS, **GREEDY)
    with attach(model, CachePipeline(window=5), **SIZES):
        monkeypatch.setattr(GenerationMixin, "generate", counted)
        found = model.generate(IDS, **GREEDY)
    with attach(model, CachePipeline(window=5), **SIZES):
        again = model.generate(IDS, **GREEDY)
    assert len(calls) == 2
    assert found.tolist() == again.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda x: x.generate(IDS, inputs=IDS), "generate: got inputs both by position and"),
        (
            lambda x: x.generate(IDS, *[None] * 10, "more"),
            "at most 11 arguments by position, got 12",
        ),
        (lambda x: x.model(IDS, input_ids=IDS), "forward: got input_ids both by position and"),
        (lambda x: x.model(IDS, *[None] * 30), "at most 6 arguments by position, got 31"),
    ],
)
def test_arguments_given_twice_or_too_many(call, said):
    model = tiny()
    with pytest.raises(TypeError, match="multiple values|positional arguments"):
        call(model)
    with attach(model, CachePipeline(window=5), **SIZES), torch.no_grad():
        with pytest.raises(TypeError, match=said):
            call(model)
        assert model(IDS).logits.shape[1] == 12
