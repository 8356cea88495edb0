"""Keys before RoPE: what each layer's record gives is what the model had before it rotated."""

from __future__ import annotations

import sys

import attrs
import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from kvpolicy.adapters.hf.rule.pre_rope import keep_for, key_before_rope
from kvpolicy.adapters.hf.rule.probe import PreRope, probe
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.versions import NEWEST

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}
YARN["original_max_position_embeddings"] = 64
LONG = {"sliding_window": 32}  # than the prompt, so that transformers' cache keeps all keys
# By type: changes to its config, and whether the keys come from a submodule, and of which name.
TYPES = {
    "llama": ({}, "k_proj"),
    "llama-yarn": ({"rope_parameters": YARN}, "k_proj"),
    "qwen3": ({}, "k_norm"),
    "olmo3": (LONG, "k_norm"),
    "cohere": ({}, "k_proj"),
    "glm4": ({}, "k_proj"),
    "ernie4_5": ({}, "k_proj"),
    "gpt_oss": (LONG, "k_proj"),
    "phi3": ({}, "qkv_proj"),
    "gpt_neox": ({}, "query_key_value"),
    "stablelm": ({}, "k_proj"),
    "persimmon": ({}, "k_layernorm"),
    "zaya": ({}, "qk_norm"),
    "qwen3_5": ({}, "k_norm"),
    "dbrx": ({}, None),
    "olmo": ({"clip_qkv": 0.5}, None),
}
TOKENS = torch.arange(10, 24)[None]


def cached(model):
    """The keys of each layer that stores some, as transformers' own cache has them."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=TOKENS, past_key_values=cache, use_cache=True)
    return {n: x.keys for n, x in enumerate(cache.layers) if getattr(x, "keys", None) is not None}


def got(model, layer, pre, key):
    """The key before RoPE in a forward of `model`, from the record alone."""
    kept = []
    hooks = keep_for(model, pre, model.get_submodule(layer.module), kept.append)
    cached(model)
    for hook in hooks:
        hook.remove()
    return key_before_rope(pre, key, kept[-1] if kept else None)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=NEWEST) if x == "dbrx" else x for x in TYPES]
)
def test_it_is_what_the_model_did_not_rotate_yet(name, monkeypatch):
    """Of the first layer that rotates: its input is the same where the model rotates nothing."""
    changes, module = TYPES[name]
    model = tiny_model(name.split("-")[0], **changes)
    found = probe(model, again=True)
    layer = next(x for x in found.stored if x.pre_rope.form != "same")
    key = cached(model)[layer.layer]
    pre = layer.pre_rope
    assert (pre.module.rsplit(".", 1)[-1] if pre.form == "module" else None) == module
    back = attrs.evolve(pre, form="rotate_back", module="")
    exact, rotated = got(model, layer, pre, key), got(model, layer, back, key)
    file = sys.modules[type(model.get_submodule(layer.module)).__module__]
    for rotate in ("apply_rotary_pos_emb", "apply_rotary_emb"):
        if hasattr(file, rotate):
            monkeypatch.setattr(file, rotate, lambda q, k, *a, **kw: (q, k))
    expected = cached(model)[layer.layer]
    assert not torch.allclose(key, expected, atol=1e-2)
    size = expected.abs().max()
    assert exact.shape == expected.shape
    if pre.form == "module":
        assert torch.equal(exact, expected)
    assert (exact - expected).abs().max() <= 1e-5 * size
    assert (rotated - expected).abs().max() <= 1e-5 * size


@pytest.mark.parametrize("name", ["llama4", "nanochat"])
def test_norms_after_rope(name):
    """What RoPE was given is the projection's output, before a norm that follows the rotation."""
    model = tiny_model(name, **({"attention_chunk_size": 32} if name == "llama4" else {}))
    layer = probe(model, again=True).stored[0]
    assert layer.pre_rope.form == "module" and layer.pre_rope.module.endswith(".k_proj")
    kept = []
    module = model.get_submodule(layer.pre_rope.module)
    hook = module.register_forward_hook(lambda m, a, output: kept.append(output))
    key = cached(model)[layer.layer]
    hook.remove()
    expected = kept[0].view(1, key.shape[2], key.shape[1], -1).transpose(1, 2)
    assert torch.equal(got(model, layer, layer.pre_rope, key), expected)


@pytest.mark.parametrize("name", ["smollm3", "cohere2", "gpt2", "jamba"])
def test_layers_without_rope(name):
    model = tiny_model(name)
    layers = [x for x in probe(model, again=True).stored if x.pre_rope.form == "same"]
    assert layers
    key = cached(model)[layers[0].layer]
    assert got(model, layers[0], layers[0].pre_rope, key) is key


class Hidden(LlamaAttention):
    """Projects keys by a weight that is no submodule's."""

    rotates = staticmethod(apply_rotary_pos_emb)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **given):
        split = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            nn.functional.linear(hidden_states, x.weight).view(split).transpose(1, 2)
            for x in (self.q_proj, self.k_proj, self.v_proj)
        )
        if type(self).queries:
            query = self.q_proj(hidden_states).view(split).transpose(1, 2)
        query, key = type(self).rotates(query, key, *position_embeddings)
        key, value = given["past_key_values"].update(key, value, self.layer_idx)
        function = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        out, _ = function(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None

    queries = True


class NoTrace(Hidden):
    """And queries too, so that nothing tells how it rotates."""

    queries = False


def toy(kind):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=160, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    made = kind(config, 1)
    made.load_state_dict(model.model.layers[1].self_attn.state_dict())
    model.model.layers[1].self_attn = made
    return model


def test_keys_that_no_submodule_puts_out_are_rotated_back_as_the_queries_are():
    model = toy(Hidden)
    layer = probe(model, again=True).stored[1]
    assert layer.pre_rope.form == "rotate_back" and not layer.no_pre_rope
    kept = []
    attention = model.model.layers[1].self_attn
    hook = attention.register_forward_pre_hook(
        lambda m, a, kw: kept.append(kw["hidden_states"]), with_kwargs=True
    )
    key = cached(model)[1]
    hook.remove()
    expected = attention.k_proj(kept[0]).view(1, -1, 2, 16).transpose(1, 2)
    found = got(model, layer, layer.pre_rope, key)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_a_trace_there_is_no_way_and_a_reason():
    layer = probe(toy(NoTrace), again=True).stored[1]
    assert layer.pre_rope is None and layer.no_pre_rope.startswith("no submodule's output gives")


def test_readers_of_shared_keys_have_none():
    found = probe(tiny_model("gemma3n_text"))
    assert {x.no_pre_rope for x in found.layers if x.shared} == {
        "it reads the keys of layer 2", "it reads the keys of layer 3",
    }  # fmt: skip


@pytest.mark.parametrize("form", ["module", "rotate_back"])
@pytest.mark.parametrize("name", ["gpt_neox", "cohere"])
def test_it_is_traced(name, form):
    """In one graph, without a break."""
    model = tiny_model(name)
    layer = probe(model).stored[0]
    pre = attrs.evolve(layer.pre_rope, form=form, module=layer.pre_rope.module * (form == "module"))
    kept = []
    hooks = keep_for(model, pre, model.get_submodule(layer.module), kept.append)
    key = cached(model)[layer.layer]
    for hook in hooks:
        hook.remove()

    def run(key, kept):
        return key_before_rope(pre, key, kept)

    traced = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(traced(key, kept[0]), run(key, kept[0]))


def test_heads_first_outputs():
    pre = PreRope(form="module", module="x", stride=4, heads_first=True)
    output = torch.randn(1, 2, 3, 4)
    assert key_before_rope(pre, torch.empty(1, 2, 3, 4), output) is output
