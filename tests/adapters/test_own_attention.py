"""Models that were loaded with an attention or mask function that transformers did not define."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import prompt, tiny

PIPELINE = CachePipeline(window=5)
IDS = prompt([20])["input_ids"]
PLAIN = functools.partial(sdpa_attention_forward)


def halved(module, query, *args, **kwargs):
    """Attention of another temperature."""
    return sdpa_attention_forward(module, query * 0.5, *args, **kwargs)


def scaled(module, *args, my_scale=1.0, **kwargs):
    """An argument that only this function reads, which a forward hands on."""
    output, weights = sdpa_attention_forward(module, *args, **kwargs)
    return output * my_scale, weights


def near(*args, **kwargs):
    """Masks that show the last few tokens."""
    made = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    return made & ~torch.ones_like(made).tril(-4)


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """Names of functions for one test."""
    for holder, more in (
        (ALL_ATTENTION_FUNCTIONS, {"halved": halved, "scaled": scaled, "near": PLAIN}),
        (ALL_MASK_ATTENTION_FUNCTIONS, {"halved": sdpa_mask, "scaled": sdpa_mask, "near": near}),
    ):
        monkeypatch.setattr(type(holder), "_global_mapping", type(holder)._global_mapping | more)


@pytest.mark.parametrize(
    ("name", "what", "more"),
    [
        ("halved", "attention", {}),
        ("scaled", "attention", {"my_scale": 0.5}),
        ("near", "masks", {}),
    ],
)
@torch.no_grad()
def test_refused_by_name(name, what, more):
    model = tiny()
    as_loaded = model(IDS).logits
    model.set_attn_implementation(name)
    assert not torch.allclose(model(IDS, **more).logits, as_loaded, atol=1e-3)
    before = set(vars(model))
    said = f"^attn_implementation: '{name}' names {what} that transformers did not define"
    with pytest.raises(UnsupportedError, match=said):
        attach(model, PIPELINE)
    assert model.config._attn_implementation == name and set(vars(model)) == before
    model.set_attn_implementation("sdpa")
    with attach(model, PIPELINE):
        assert torch.allclose(model(IDS).logits, as_loaded, atol=1e-4)


def test_another_function_of_a_known_name():
    model = tiny()
    AttentionInterface.register("sdpa", halved)
    with pytest.raises(UnsupportedError, match=r"^attn_implementation: 'sdpa' names attention"):
        attach(model, PIPELINE)
    AttentionInterface.register("sdpa", PLAIN)
    AttentionMaskInterface.register("sdpa", near)
    with pytest.raises(UnsupportedError, match=r"^attn_implementation: 'sdpa' names masks"):
        attach(model, PIPELINE)


NAMES = ("eager", "sdpa", "flex_attention", *(f"flash_attention_{n}" for n in (2, 3, 4)))


@pytest.mark.parametrize("name", [*NAMES, *(f"paged|{name}" for name in NAMES), None])
def test_those_of_transformers_are_served(name):
    model = tiny()
    model.config._attn_implementation = name  # as loaded where its package is installed
    with attach(model, PIPELINE):
        model.generate(IDS, max_new_tokens=2, eos_token_id=None)
    assert model.config._attn_implementation == name
