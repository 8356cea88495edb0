"""What does not keep the contract is refused: by the check, the layer and the line."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    DecisionTransformerConfig,
    DecisionTransformerModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from kvpolicy.adapters.hf.rule.probe import ModelRefused, check_kinds, probe
from kvpolicy.adapters.hf.rule.tiny import tiny_config, tiny_model
from tests.support.adapters.versions import NEWEST

# By type: the check, the layer, the module, and what is said.
REFUSED = {
    "deepseek_v3": ("handle", 0, "DeepseekV3Attention", "reads .shape of its cached keys"),
    "bloom": ("handle", 0, "BloomAttention", "reads .reshape of its cached keys"),
    "falcon": ("handle", 0, "FalconAttention", "reads .shape of its cached keys"),
    "gptj": ("handle", 0, "GPTJAttention", "reads .to of its cached keys"),
    "diffllama": ("handle", 0, "DiffLlamaAttention", "calls torch's chunk on its cached keys"),
    "mllama": ("handle", None, "MllamaTextModel", "reads .numel of its cached keys"),
    "mpt": ("forward", None, "MptModel", "its forward fails without a mask"),
    "inkling_text": ("arguments", 0, "InklingAttention", "is called with position_bias"),
    "minimax": ("forward", None, "MiniMaxModel", "uses cache of its own"),
    "moshi": ("mask", 0, "MoshiAttention", "a query at position 64 sees the key at 0"),
    "openai-gpt": ("updates", 0, "", "a forward cached no keys"),
    "xlnet": ("updates", 0, "", "a forward cached no keys"),
}


@NEWEST
@pytest.mark.parametrize("name", REFUSED)
def test_types(name):
    with pytest.raises(ModelRefused) as found:
        probe(tiny_model(name))
    error, (check, layer, module, said) = found.value, REFUSED[name]
    assert (error.check, error.layer, error.module) == (check, layer, module)
    assert said in str(error) and f"check '{check}'" in str(error)
    if check != "updates":
        file, line = error.place.split(":")
        assert file.startswith("modeling_") and int(line) > 0


def test_a_model_that_embeds_no_tokens():
    said = "its get_input_embeddings embeds no tokens; only decoders are served"
    with pytest.raises(ModelRefused, match=said):
        probe(DecisionTransformerModel(DecisionTransformerConfig(hidden_size=16, n_layer=1)))


@NEWEST
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mamba", "no layer keeps keys and values"),
        ("axk2", "of kind 'indexed_attention'"),
        ("deepseek_v4", "of kind 'heavily_compressed_attention'"),
        ("minimax_m3_vl_text", "of kind 'minimax_m3_sparse'"),
        ("blt", "transformers finds no kinds of layers in its config"),
    ],
)
def test_kinds(name, said):
    with pytest.raises(ModelRefused, match=said) as found:
        check_kinds(tiny_config(name))
    assert found.value.check == "kinds"


class Toy(LlamaAttention):
    """Llama's attention, with places where a subclass may break it."""

    at = 1  # the layer that has it

    def keys(self, key, cache):
        return key

    def call(self, function, query, key, value, mask, **given):
        return function(self, query, key, value, mask, scaling=self.scaling, **given)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **given):
        cache = given["past_key_values"]
        split = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(split).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key, value = cache.update(self.keys(key, cache), value, self.layer_idx)
        function = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = self.call(function, query, key, value, attention_mask)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def eager_attention_forward(module, query, key, value, mask, scaling, **given):
    scaling = given.get("own", scaling)
    return modeling_llama.eager_attention_forward(module, query, key, value, mask, scaling)


class Touching(Toy):
    def call(self, function, query, key, value, mask, **given):
        return super().call(function, query, key * 1.0, value, mask)


class Asking(Toy):
    def call(self, function, query, key, value, mask, **given):
        return super().call(function, query, key, value, mask, temperature=2.0)


class Twice(Toy):
    def keys(self, key, cache):
        if not isinstance(cache, DynamicCache):
            cache.update(key, key, self.layer_idx)
        return key


class ReadTwice(Toy):
    def call(self, function, query, key, value, mask, **given):
        super().call(function, query, key, value, mask)
        return super().call(function, query, key, value, mask)


class WithoutCache(Toy):
    def call(self, function, query, key, value, mask, **given):
        other = query[:, :2] if query.shape[2] > 1 else query[:, :2].repeat(1, 1, 12, 1)
        return super().call(function, query, other, other, mask)


class Narrow(Toy):
    """Sees the last three keys, as no config says."""

    def call(self, function, query, key, value, mask, **given):
        if mask is not None:
            far = torch.ones_like(mask, dtype=torch.bool).tril(mask.shape[-1] - mask.shape[-2] - 3)
            mask = mask.masked_fill(far, torch.finfo(mask.dtype).min)
        return super().call(function, query, key, value, mask)


class Bent(Toy):
    """Bends scores by itself, where it computes them."""

    def forward(self, *args, **given):
        return super().forward(*args, **given)


def bent_eager(module, query, key, value, mask, scaling, **given):
    found = modeling_llama.eager_attention_forward(module, query, key, value, mask, scaling * 1.01)
    return found


class Forgetful(Toy):
    """Is another layer where it has no mask."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **given):
        size = 1.0 if attention_mask is None else 1.001
        return super().forward(hidden_states * size, position_embeddings, attention_mask, **given)


class Drifting(Toy):
    """Gives something else where it has no mask; in the last layer, so that no other sees it."""

    at = 2

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **given):
        out, weights = super().forward(hidden_states, position_embeddings, attention_mask, **given)
        return out if attention_mask is not None else out * 1.01, weights


BROKEN = {
    Touching: ("handle", "uses its cached keys or values by __mul__"),
    Asking: ("arguments", "is called with temperature"),
    Twice: ("updates", "caches keys 2 times in one forward"),
    ReadTwice: ("updates", "its keys are read twice in one forward"),
    WithoutCache: ("handle", "keys that did not come from the cache"),
    Narrow: ("attention", "from softmax attention, rounding allows"),
    Forgetful: ("attention", "its queries are others without a mask"),
    Drifting: ("logits", "logits of the prompt differ"),
}


def toy(kind):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=160, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    made = kind(config, kind.at)
    made.load_state_dict(model.model.layers[kind.at].self_attn.state_dict())
    model.model.layers[kind.at].self_attn = made
    return model


def test_the_toy_itself_is_served():
    assert len(probe(toy(Toy)).layers) == 3


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_models(kind):
    check, said = BROKEN[kind]
    with pytest.raises(ModelRefused) as found:
        probe(toy(kind))
    assert (found.value.check, found.value.layer) == (check, None if check == "logits" else 1)
    assert said in str(found.value)
    if check in ("handle", "arguments", "updates"):
        assert found.value.place.startswith("test_refused.py:")


def test_scores_that_the_model_bends_by_itself(monkeypatch):
    monkeypatch.setitem(globals(), "eager_attention_forward", bent_eager)
    with pytest.raises(ModelRefused, match="from softmax attention") as found:
        probe(toy(Bent))
    assert (found.value.check, found.value.layer) == ("attention", 1)


def test_a_window_that_the_prompt_does_not_reach():
    """Of 4096 keys, which a short prompt cannot show, but the mask function says."""
    model = tiny_model("mistral", sliding_window=4096)
    assert {x.window for x in probe(model).layers} == {4096}
    model.config.layer_types = ["full_attention"] * 8
    with pytest.raises(ModelRefused, match="a query at position 4096 does not see") as found:
        probe(model)
    assert found.value.check == "mask"


def test_what_is_no_causal_model():
    model = tiny_model("bert")
    model.config.is_decoder = False
    with pytest.raises(ModelRefused, match="rounding allows [^;]*$") as found:
        probe(model)
    assert found.value.check == "attention"
    with pytest.raises(ModelRefused, match="; only decoders are served.*, no encoders$"):
        probe(model.bert)


def test_dropout_and_causality_are_arguments():
    from kvpolicy.adapters.hf.rule.probe_attention import unknown_argument

    assert unknown_argument(0.1, None, {}) == "dropout"
    assert unknown_argument(0.0, False, {}) == "is_causal=False"
    assert unknown_argument(0.0, True, {"softcap": 2.0, "position_ids": 1, "other": None}) == ""
    assert unknown_argument(0.0, None, {"position_bias": nn.Identity()}) == "position_bias"
