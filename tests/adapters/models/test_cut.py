"""Where a model cannot run, a random one of its config, cut and narrow, says the same of it."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy.adapters.hf.rule.cut import cut_config, cut_model
from kvpolicy.adapters.hf.rule.kinds import layer_kinds
from kvpolicy.adapters.hf.rule.probe import ModelRefused, probe
from kvpolicy.adapters.hf.rule.tiny import class_of, default_config, tiny_config, tiny_model

TYPES = ("llama", "gpt_oss", "gemma2", "llama4", "qwen3_next", "gemma3n_text", "gemma4_text")


def on_meta(config, name):
    with torch.device("meta"):
        return class_of(name)._from_config(config).eval()


@pytest.mark.parametrize("name", TYPES)
def test_it_says_what_the_model_itself_says(name):
    config = tiny_config(name)
    whole = probe(tiny_model(name), again=True)
    found = probe(on_meta(config, name), again=True)
    assert found.way == "cut" and found.reason.startswith("its layers are offloaded")
    assert found.kinds == whole.kinds and found.own == whole.own

    def comparable(layers):
        return [attrs.evolve(x, device=torch.device("meta"), dtype=torch.float32) for x in layers]

    assert comparable(found.layers) == comparable(whole.layers)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_next", "qwen3_moe"])
def test_a_large_config_is_cut_to_a_layer_of_each_kind(name):
    config = default_config(name)
    kinds = layer_kinds(config)
    cut, count = cut_config(config)
    assert set(layer_kinds(cut)) == set(kinds) and count == cut.num_hidden_layers <= 4 < len(kinds)
    for size in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(cut, size, None) == getattr(config, size, None)
    assert config.num_hidden_layers == len(kinds)
    model = cut_model(on_meta(config, name)) if name == "gpt_oss" else None
    assert model is None or sum(x.numel() for x in model.parameters()) < 1e8


def test_what_does_not_keep_the_contract_is_refused_too():
    with pytest.raises(ModelRefused) as found:
        probe(on_meta(tiny_config("deepseek_v3"), "deepseek_v3"))
    assert found.value.check == "handle"


def test_a_model_that_is_here_and_fails_is_not_replaced():
    with pytest.raises(ModelRefused) as found:
        probe(tiny_model("mpt"))
    assert found.value.check == "forward"
