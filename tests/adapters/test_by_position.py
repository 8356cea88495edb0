"""Arguments by position reach wrappers and classes as they were given."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, LlamaModel

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import prompt, tiny

PIPELINE = CachePipeline(window=5)
IDS = prompt([9, 9])["input_ids"]
CONFIG = GenerationConfig(max_new_tokens=4, pad_token_id=0)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def of_class(generate):
    def make():
        plain = tiny()
        kind = type("Mine", (LlamaForCausalLM,), {"generate": generate})
        model = kind(plain.config).eval()
        model.load_state_dict(plain.state_dict())
        return model

    return make


def flips(self, *args, **kwargs):
    """Looks at the first argument by position."""
    if args:
        args = (args[0].flip(-1), *args[1:])
    return LlamaForCausalLM.generate(self, *args, **kwargs)


def names_one(self, input_ids, *args, **kwargs):
    return LlamaForCausalLM.generate(self, input_ids, *args, **kwargs)


def names_two(self, input_ids, config=None, **kwargs):
    return LlamaForCausalLM.generate(self, input_ids, config, **kwargs)


def of_object(wrap):
    def make():
        model = tiny()
        model.generate = wrap(model.generate, model)
        return model

    return make


def as_function(whole, model):
    def generate(input_ids, **kwargs):
        return whole(input_ids=input_ids, **kwargs)[:, input_ids.shape[1] :]

    return generate


def as_method(whole, model):
    return types.MethodType(flips, model)


@pytest.mark.parametrize(
    "make",
    [
        *(of_class(each) for each in (flips, names_one, names_two)),
        *(of_object(each) for each in (as_function, as_method)),
        tiny,
    ],
    ids=["flips", "names_one", "names_two", "function", "method", "plain"],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_generate(make, with_config):
    model = make()
    args = (IDS, CONFIG) if with_config else (IDS,)

    def run():
        try:
            return model.generate(*args, **({} if with_config else GREEDY)).tolist()
        except TypeError as error:  # one that takes no second argument
            return type(error)

    plain = run()
    with attach(model, PIPELINE):
        assert run() == plain
    assert with_config or isinstance(plain, list)


@torch.no_grad()
def test_forward_of_a_decoder():
    class Decoder(LlamaModel):
        def forward(self, *args, **kwargs):
            if args:
                args = (args[0].flip(-1), *args[1:])
            return super().forward(*args, **kwargs)

    plain = tiny().model
    model = Decoder(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    mask = torch.ones_like(IDS)
    calls = [lambda: model(IDS), lambda: model(IDS, mask), lambda: model(input_ids=IDS)]
    wanted = [call().last_hidden_state for call in calls]
    with attach(model, PIPELINE):
        found = [call().last_hidden_state for call in calls]
    assert not torch.allclose(wanted[0], wanted[2], atol=1e-2)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
