"""A probe finds what a cache must know, agrees with the model, and leaves it as it was."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from kvpolicy.adapters.hf.rule import probe as module
from kvpolicy.adapters.hf.rule.kinds import LayerKind
from kvpolicy.adapters.hf.rule.probe import ModelRefused, probe, tolerance
from kvpolicy.adapters.hf.rule.probe_masks import Bounded, difference
from kvpolicy.adapters.hf.rule.tiny import causal_types, tiny_config, tiny_model
from tests.support.adapters.left_out import PARTS, left_out, logits

# Of each type: layers that store and that read others' keys, the sizes of all, and what else.
FACTS = {
    "llama": (8, 0, {(4, 2, 16, 16)}, set()),
    "mistral": (8, 0, {(4, 2, 16, 16)}, {"window"}),
    "phi3": (8, 0, {(4, 2, 16, 16)}, set()),
    "glm4": (8, 0, {(4, 2, 16, 16)}, set()),
    "gpt2": (8, 0, {(4, 4, 16, 16)}, set()),
    "olmo3": (8, 0, {(4, 2, 16, 16)}, {"window"}),
    "gemma2": (8, 0, {(4, 2, 16, 16)}, {"window", "softcap", "scale"}),
    "granite": (8, 0, {(4, 2, 16, 16)}, {"scale"}),
    "gpt_oss": (8, 0, {(4, 2, 16, 16)}, {"window", "sinks"}),
    "llama4": (8, 0, {(4, 2, 16, 16)}, {"chunk"}),
    "mimo_v2_flash": (8, 0, None, {"window", "sinks"}),
    "gemma3n_text": (4, 4, {(4, 2, 16, 16)}, {"window", "scale"}),
    "qwen3_next": (2, 0, {(4, 2, 16, 16)}, set()),
    "falcon_h1": (8, 0, {(4, 2, 16, 16)}, set()),
    "zamba2": (2, 0, {(4, 4, 32, 32)}, {"scale"}),
    "qwen3_moe": (8, 0, {(4, 2, 16, 16)}, set()),
}


def parts(found):
    """What of a model's attention a plain one would leave out."""
    held = {
        "window": any(layer.window for layer in found.layers),
        "chunk": any(layer.chunk for layer in found.layers),
        "sinks": any(layer.sinks for layer in found.layers),
        "softcap": any(layer.softcap for layer in found.layers),
        "scale": any(not math.isclose(x.scale, x.head_dim**-0.5) for x in found.layers),
    }
    return {name for name in PARTS if held[name]}


def check_sharp(model, found):
    """Attention anew gives the model's logits; without any part of it they differ by far more."""
    tokens = torch.arange(10, 24)[None]
    expected = logits(model, tokens)
    bound = tolerance(torch.float32, len(found.layers)) * float(expected.std())
    with left_out(model, ""):
        assert (logits(model, tokens) - expected).abs().max() <= bound
    for part in parts(found):
        with left_out(model, part):
            assert (logits(model, tokens) - expected).abs().max() > 100 * bound, part


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_types(name):
    model = tiny_model(name)
    found = probe(model, again=True)
    stored, shared, sizes, held = FACTS[name]
    assert len(found.stored) == stored and sum(x.shared for x in found.layers) == shared
    assert found.way == "in place" and found.decoded and 0 < found.difference <= 1
    seen = {(x.heads, x.kv_heads, x.head_dim, x.value_dim) for x in found.layers}
    assert sizes is None or seen == sizes
    assert parts(found) == held
    for layer, attention in zip(found.layers, found.modules(model), strict=True):
        assert type(attention).__name__.endswith("Attention")
        assert not layer.sinks or isinstance(getattr(attention, layer.sinks), torch.Tensor)
        assert layer.shared or layer.pre_rope is not None
    check_sharp(model, found)


def test_values_of_another_size_and_layers_of_several():
    found = probe(tiny_model("mimo_v2_flash"))
    assert {x.value_dim for x in found.layers} == {8} and {x.head_dim for x in found.layers} == {16}


def test_readers_of_shared_keys_name_the_layer():
    found = probe(tiny_model("gemma3n_text"))
    assert [(x.layer, x.reads) for x in found.layers[4:]] == [(4, 2), (5, 3), (6, 2), (7, 3)]
    assert [(x.window, x.kind) for x in found.layers[4:6]] == [(5, "shared"), (None, "shared")]


def test_layers_of_transformers_own_state():
    found = probe(tiny_model("qwen3_next"))
    assert found.own == (0, 1, 2, 4, 5, 6) and [x.layer for x in found.layers] == [3, 7]
    assert probe(tiny_model("falcon_h1")).own == tuple(range(8))


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2", "qwen3_moe", "llama4"])
def test_16_bits(name):
    found = probe(tiny_model(name).bfloat16())
    assert {x.dtype for x in found.layers} == {torch.bfloat16}
    assert found.layers[0].pre_rope is not None


def test_an_object_that_was_given_a_forward_is_checked_itself(monkeypatch):
    probe(tiny_model("llama"))
    model = tiny_model("llama")
    model.model.layers[1].forward = lambda hidden, *args, **kwargs: hidden
    with pytest.raises(ModelRefused, match="check 'updates' failed at layer 1"):
        probe(model)
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    whole = mlp.forward

    @functools.wraps(whole)
    def wrapper(*args):
        return whole(*args)

    mlp.forward = wrapper
    assert not probe(model).cached and not probe(model).cached
    mlp.forward = functools.partial(type(mlp).forward, mlp)  # transformers' own code
    assert probe(model).cached
    assert probe(tiny_model("llama")).cached


def test_a_configuration_is_checked_once(monkeypatch):
    probe(tiny_model("llama", seed=1), again=True)
    monkeypatch.setattr(module, "probe_in_place", None)
    found = probe(tiny_model("llama", seed=2))
    assert found.cached and found.layers == probe(tiny_model("llama", seed=1)).layers
    with pytest.raises(TypeError, match="not callable"):
        probe(tiny_model("llama", sliding_window=9, attention_bias=True))


def snapshot(model):
    """Everything that a model's modules and configs hold, by identity."""
    state = {}
    for name, part in model.named_modules():
        for key, value in vars(part).items():
            held = list(value.items()) if isinstance(value, dict) else value
            state[name, key] = held
        if hasattr(part, "config"):
            state[name, "named"] = part.config._attn_implementation
    return state


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5", "deepseek_v3", "axk2"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(name, training):
    """Also where it is refused."""
    model = tiny_model(name).train(training)
    if name == "llama":
        model.set_attn_implementation("sdpa")
        model.model.layers[0].self_attn.register_forward_hook(lambda *a: None)
        model.model.layers[1].train(not training)
    before, rng, weights = snapshot(model), torch.get_rng_state(), model.state_dict()
    copies = {key: value.clone() for key, value in weights.items()}
    with torch.enable_grad():
        try:
            probe(model, again=True)
        except ModelRefused:
            assert name in ("deepseek_v3", "axk2")
        assert torch.is_grad_enabled()
    after = snapshot(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key] is value or after[key] == value, key
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(copies[key], value) for key, value in model.state_dict().items())


def test_rounding_that_grew_is_told_from_a_difference(monkeypatch):
    """Logits that only rounding moved pass with the model's own attention in between."""
    bounds = iter([1e-30])
    monkeypatch.setattr(module, "tolerance", lambda dtype, calls: next(bounds, 1e-6))
    assert probe(tiny_model("llama"), again=True).difference <= 1


UNBUILT = {"gemma3n"}  # its vision tower needs timm


@pytest.mark.slow
@pytest.mark.parametrize("name", causal_types())
def test_every_type_is_served_or_refused_with_a_reason(name):
    try:
        module.check_kinds(tiny_config(name))
        model = tiny_model(name)
        found = probe(model)
    except ModelRefused as error:
        assert error.check == "kinds" or error.layer is not None or error.place
        return
    except ImportError:
        assert name in UNBUILT
        return
    check_sharp(model, found)


def test_without_verify_logits_may_differ(monkeypatch):
    from kvpolicy import CachePipeline, attach

    monkeypatch.setattr(module, "tolerance", lambda dtype, calls: -1.0)
    model = tiny_model("qwen3", num_hidden_layers=3)
    with attach(model, CachePipeline(window=4), verify=False):
        pass
    with pytest.raises(ModelRefused, match="check 'logits'"):
        attach(model, CachePipeline(window=4))  # what was not verified is not remembered


@pytest.mark.parametrize(
    "look",
    [
        lambda table, at: table[at],
        lambda table, at: table.expand(2, -1)[0 * at, at],
        lambda table, at: table.index_select(0, at),
        lambda table, at: table.gather(0, at),
    ],
)
def test_lookups_beyond_a_table_raise_before_they_run(look):
    """A GPU's own assertion would break its context."""
    table = torch.arange(4)
    with Bounded():
        assert torch.equal(look(table, torch.tensor([3, 0])), torch.tensor([3, 0]))
        with pytest.raises(IndexError, match="^index: wanted below 4, got 5$"):
            look(table, torch.tensor([0, 5]))
        assert torch.equal(table[table > 2], torch.tensor([3]))


def test_a_mask_that_looks_positions_up_is_asked_about_the_prompt_alone():
    kind, places = LayerKind(kind="full"), torch.tensor([0, 3, 4, 9])
    group = torch.tensor([0, 0, 1, 1, 1])

    def mask(row, head, query, key):
        return (key <= query) & (group[key] == group[query])

    assert difference(mask, kind, places, 5) == (3, 0, False)
    assert difference(lambda row, head, query, key: key <= query, kind, places, 5) is None
