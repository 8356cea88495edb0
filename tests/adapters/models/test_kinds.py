"""Kinds of layers are read from configs, in every form that transformers gives them."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, cache_utils

from kvpolicy import UnsupportedError
from kvpolicy.adapters.hf.rule.kinds import REFUSED, LayerKind, layer_kinds
from kvpolicy.adapters.hf.rule.tiny import tiny_config

FULL, SLIDING = LayerKind(kind="full"), LayerKind(kind="sliding", window=5)
LINEAR, CONV = LayerKind(kind="linear", states=1), LayerKind(kind="conv", states=1)
FOUND = {
    "llama": [FULL] * 8,
    "mistral": [SLIDING] * 8,
    "gpt_oss": [SLIDING, FULL] * 4,
    "llama4": [*[LayerKind(kind="chunked", chunk=5)] * 3, FULL] * 2,
    "qwen3_next": [*[LINEAR] * 3, FULL] * 2,
    "lfm2": [CONV, FULL] * 4,
    "falcon_h1": [LayerKind(kind="hybrid", states=1)] * 8,
    "gemma3n_text": [*[SLIDING, FULL] * 2, *[LayerKind(kind="shared")] * 4],
}


@pytest.mark.parametrize("name", FOUND)
def test_kinds_of_types(name):
    assert layer_kinds(tiny_config(name)) == tuple(FOUND[name])


def test_layers_without_attention_are_not_shared_ones():
    kinds = [kind.kind for kind in layer_kinds(tiny_config("nemotron_h"))]
    assert "none" in kinds and "shared" not in kinds


def test_a_text_decoder_inside_a_multimodal_config():
    assert layer_kinds(tiny_config("gemma3")) == layer_kinds(tiny_config("gemma3_text"))


def given(monkeypatch, names, arguments):
    found = (names, arguments)
    monkeypatch.setattr(cache_utils, "get_layer_types_and_kwargs", lambda config: found)
    return LlamaConfig(num_hidden_layers=len(names))


def test_one_dict_for_all_layers_as_in_5_17(monkeypatch):
    names = ["full_attention", "sliding_attention", "moe"]
    config = given(monkeypatch, names, {"sliding_window": 7})
    assert layer_kinds(config) == (
        FULL, LayerKind(kind="sliding", window=7), LayerKind(kind="none"),
    )  # fmt: skip


def test_sharing_layers_are_left_out_in_5_17(monkeypatch):
    config = given(monkeypatch, ["full_attention"], {})
    config.layer_types = ["full_attention"] * 3
    assert [kind.kind for kind in layer_kinds(config)] == ["full", "shared", "shared"]


@pytest.mark.parametrize("name", [*REFUSED, "a_new_kind"])
def test_other_kinds_are_refused_by_name(monkeypatch, name):
    config = given(monkeypatch, ["full_attention", name], [{}, {}])
    with pytest.raises(UnsupportedError, match=f"layer 1 of LlamaConfig is of kind '{name}': "):
        layer_kinds(config)


def test_a_window_that_is_none_is_refused(monkeypatch):
    config = given(monkeypatch, ["sliding_attention"], [{"sliding_window": None}])
    with pytest.raises(UnsupportedError, match="layer 0 needs sliding_window, the config has None"):
        layer_kinds(config)
