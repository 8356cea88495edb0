"""Configs that say different values for layers, as transformers has them from 5.23 or so."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import prompt

IDS = prompt([30])["input_ids"]


def made(each):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, per_layer_config=each, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    if not hasattr(type(config), "is_heterogeneous"):
        pytest.skip("this transformers has one value for all layers")
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("each", [{0: {"sliding_window": 5}}, {1: {"sliding_window": 5}}])
@torch.no_grad()
def test_served(each):
    model = made(each)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    plain, tokens = model(IDS).logits, model.generate(IDS, **options)
    with attach(model, CachePipeline(window=5)):
        assert torch.allclose(model(IDS).logits, plain, atol=1e-4)
        assert torch.equal(model.generate(IDS, **options), tokens)


@torch.no_grad()
def test_changed_while_attached():
    model = made({0: {"sliding_window": 5}})
    with attach(model, CachePipeline(window=5)):
        model.config.per_layer_config = {0: {"sliding_window": 7}}
        with pytest.raises(UnsupportedError, match=r"^config\.sliding_window: it has changed"):
            model(IDS)
