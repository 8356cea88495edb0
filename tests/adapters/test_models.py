"""What is known of a model: its decoder through wrappers, its layers, their dtype and device."""

from __future__ import annotations

from types import SimpleNamespace

import attrs
import pytest
import torch
import transformers
from torch import nn

from kvpolicy import CachePipeline, UnsupportedError, WriteGate
from kvpolicy.adapters.hf import attach, spec_of
from kvpolicy.adapters.hf.fingerprints import keys_fingerprint, model_fingerprint
from kvpolicy.adapters.hf.models import attention_layers
from kvpolicy.adapters.hf.sizes import _hidden
from kvpolicy.adapters.hf.training import attach_for_training
from kvpolicy.adapters.hf.wrappers import decoder_of
from kvpolicy.training import WriteGates, train_duo_attention, train_write_gate
from tests.support.adapters.models import KINDS, SIZES, gate, prompt, tiny

GREEDY = {"do_sample": False, "max_new_tokens": 6}


class Packed(nn.Module):
    """A linear layer of integers under another name, as GPTQ, AWQ and HQQ keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", (linear.weight.data * 100).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) / 100)


def packed(kind="llama", **extra):
    model = tiny(kind, **extra)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, Packed(child))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_layers_say_what_their_attention_computes_on(kind):
    model = tiny(kind)
    windows = {"mistral": (6, 6), "qwen2-sliding": (None, 6)}.get(kind, (None, None))
    layers = attention_layers(model)
    assert windows == tuple(layer.window for layer in layers)
    for layer, module in zip(layers, [x.self_attn for x in model.model.layers], strict=True):
        assert layer.module is module
        assert (layer.heads, layer.kv_heads, layer.head_dim) == (4, 2, 16)
        assert layer.scale == module.scaling
        assert (layer.dtype, layer.device) == (torch.float32, torch.device("cpu"))
        assert layer.source is (module.k_norm if kind == "qwen3" else module.k_proj)
        assert layer.pre_rope is not None and layer.pre_rope.form == "module"


def test_the_decoder_is_found_through_wrappers():
    class Peft(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_base_model(self):
            return self.inner

    model = tiny()
    decoder = model.model
    compiled = torch.compile(model, backend="eager")
    for wrapped in (model, decoder, compiled, Peft(model), Peft(compiled), Peft(Peft(model))):
        assert decoder_of(wrapped) is decoder
        assert spec_of(wrapped) == spec_of(model)
        assert model_fingerprint(wrapped) == model_fingerprint(model)
        assert keys_fingerprint(wrapped) == keys_fingerprint(model)


def test_the_decoder_of_several_modalities_is_that_of_the_text():
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=tiny().config, vision_config=vision, image_token_index=110, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    assert decoder_of(model) is model.model.language_model
    assert spec_of(model) == spec_of(tiny())


@pytest.mark.parametrize(
    "act",
    [
        lambda model: attach(model, CachePipeline(window=5)),
        lambda model: attach_for_training(model).__enter__(),
        WriteGates.for_model,
        lambda model: train_write_gate(model, [], steps=1, lam=0.1),
        lambda model: train_duo_attention(model, [], steps=1),
    ],
)
def test_training_refuses_what_attach_refuses(act):
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedError, match="layer 0 in BloomAttention"):
        act(transformers.BloomForCausalLM(config).eval())


def test_another_kind_of_layer_is_refused_by_name():
    model = tiny("qwen3")
    model.config.layer_types = ["full_attention", "indexed_attention"]
    with pytest.raises(UnsupportedError, match="layer 1 of Qwen3Config is of kind 'indexed_atten"):
        attach(model, CachePipeline(window=5))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_layers_without_weights_under_that_name_are_served(kind):
    model, inputs = packed(kind), prompt([33, 21])
    plain = model.generate(**inputs, **GREEDY)
    with attach(model, CachePipeline(window=5), **SIZES):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert spec_of(model) == spec_of(tiny(kind))


def test_packed_keys_have_fingerprints_of_their_own():
    model, other = packed(), packed(seed=1)
    for fingerprint in (keys_fingerprint, model_fingerprint):
        before = fingerprint(model)
        assert before == fingerprint(packed())
        assert before != fingerprint(other)
        model.model.layers[0].self_attn.k_proj.qweight += 1
        assert fingerprint(model) != before
        model.model.layers[0].self_attn.k_proj.qweight -= 1


def test_fingerprints_of_0_1_0_stay():
    """Files hold them; these are what version 0.1.0 computed for this model."""
    model = tiny()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel()) % 97 - n
            parameter.copy_(values.view(parameter.shape) / 64)
    assert keys_fingerprint(model) == "9b6fce10ba8657f9"
    assert keys_fingerprint(model.to(torch.bfloat16)) == "9b6fce10ba8657f9"


def test_the_projections_decide_the_dtype():
    model = tiny().to(torch.bfloat16)
    model.model.embed_tokens.float()
    assert spec_of(model).dtype == torch.bfloat16
    model.model.layers[1].self_attn.float()
    assert spec_of(model).dtype == torch.float32  # what holds the keys of both layers
    assert spec_of(model, dtype=torch.float16).dtype == torch.float16
    model = packed().to(torch.bfloat16)
    model.model.embed_tokens.float()
    assert spec_of(model).dtype == torch.bfloat16  # that of the norms before them


def test_float8_weights_are_no_dtype_of_keys():
    model = tiny().to(torch.bfloat16)
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            weight.data = weight.data.to(torch.float8_e4m3fn)
    assert spec_of(model).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_offloaded_layers_run_where_accelerate_says(whole):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny(), prompt([20])
    plain, known = model.generate(**inputs, **GREEDY), model_fingerprint(model)
    modules = ["LlamaAttention"] if whole else None
    accelerate.cpu_offload(
        model, execution_device=torch.device("cpu"), preload_module_classes=modules
    )
    assert model.model.layers[0].self_attn.k_proj.weight.device.type == "meta"
    with attach(model, CachePipeline(window=5), **SIZES) as attached:
        assert attached.spec.device.type == "cpu"
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert model_fingerprint(model) == known
    with pytest.raises(UnsupportedError, match="without offloading"):
        keys_fingerprint(model)


def test_the_attention_layers_decide_the_device():
    model = tiny()
    model.model.embed_tokens.to("meta")
    assert spec_of(model).device == torch.device("cpu")
    assert spec_of(model, device=torch.device("meta")).device == torch.device("meta")


def test_gates_read_packed_keys():
    """A gate trained elsewhere acts on a model whose projections hold integers."""
    model = packed()
    pipeline = CachePipeline(admission=attrs.evolve(gate(), threshold=0.5))
    assert isinstance(pipeline.admission, WriteGate)
    with attach(model, pipeline, **SIZES) as attached:
        cache = attached.new_cache()
        model.generate(**prompt([33]), past_key_values=cache, **GREEDY)
    kept = [len(cache.state.kept(x, 0, h)) for x in (0, 1) for h in (0, 1)]
    assert min(kept) > 5 and max(kept) < 38


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ([(64, None), (64, None)], 64),
        ([(32, 5), (64, None)], 64),  # policies do not act in the first, which slides
        ([(64, None), (32, None)], None),
        ([(0, None)], None),
        ([(64, 5)], None),
    ],
)
def test_channels_of_the_attention_input(layers, wanted):
    """0 says of a layer that they are not known."""
    known = SimpleNamespace(layers=[SimpleNamespace(hidden=n, window=w) for n, w in layers])
    assert _hidden(known) == wanted
