"""Models inside wrappers such as PEFT's."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, LocalAttention, PhaseError, UnsupportedError
from kvpolicy.adapters.hf import KVPolicyCache, attach
from kvpolicy.adapters.hf.rule import probe as probe_module
from tests.support.adapters.faults import snapshot
from tests.support.adapters.models import prompt, tiny

PIPELINE = CachePipeline(window=5)


class Wrapper(torch.nn.Module):
    """What PEFT's models look like from outside."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base

    def generate(self, *args, **kwargs):
        return self.base.generate(*args, **kwargs)

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


def test_wrapped(qwen3):
    check_wrapped(Wrapper(qwen3))


def check_wrapped(model):
    inputs = prompt([12, 9])
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    before = snapshot_of_wrapped(model)
    with attach(model, PIPELINE) as attachment:
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=6, do_sample=False))
        assert attachment.decoding.startswith("eager")
        with pytest.raises(PhaseError, match="detach it first"):
            attach(model.get_base_model(), PIPELINE)
    assert snapshot_of_wrapped(model) == before


def snapshot_of_wrapped(model):
    return snapshot(model.get_base_model()), dict(model.__dict__)


class ValueHead(torch.nn.Module):
    """What trl's models with a value head look like: the model beside a head of its own."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model
        self.v_head = torch.nn.Linear(model.config.hidden_size, 1)

    def forward(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        kwargs |= {"output_hidden_states": True, "past_key_values": past_key_values}
        out = self.pretrained_model(input_ids, attention_mask=attention_mask, **kwargs)
        return out.logits, out.loss, self.v_head(out.hidden_states[-1]).squeeze(-1)

    def generate(self, *args, **kwargs):
        return self.pretrained_model.generate(*args, **kwargs)


@torch.no_grad()
def test_a_value_head_beside_the_model(llama):
    """Attach to the model inside; the wrapper itself is none of transformers'."""
    wrapper, inputs = ValueHead(llama), prompt([12, 9])
    options, real = {"max_new_tokens": 6, "do_sample": True}, inputs["attention_mask"].bool()

    def run():
        torch.manual_seed(4)
        return wrapper.generate(**inputs, **options), wrapper(**inputs)

    tokens, (logits, _, values) = run()
    before = snapshot(llama)
    with pytest.raises(TypeError, match="^model: wanted a model of transformers, got .*ValueHead"):
        attach(wrapper, PIPELINE)
    assert snapshot(llama) == before
    with attach(wrapper.pretrained_model, PIPELINE):
        found, (ours, _, judged) = run()
    assert torch.equal(found, tokens)
    assert (ours - logits)[real].abs().max() < 1e-4
    assert (judged - values)[real].abs().max() < 1e-4


def test_a_compiled_model(llama):
    """Attaches to the model inside, whose attributes the wrapper shows; both are restored."""
    compiled = torch.compile(llama, backend="eager")
    inputs = prompt([12, 9])
    options = {"max_new_tokens": 6, "do_sample": False}
    plain, logits = llama.generate(**inputs, **options), compiled(**inputs).logits
    before = snapshot(llama)
    for target in (compiled, llama):
        attached = attach(target, PIPELINE)
        for model in (compiled, llama):
            assert torch.equal(model.generate(**inputs, **options), plain)
            output = model(**inputs)
            assert isinstance(output.past_key_values, KVPolicyCache)
            real = inputs["attention_mask"].bool()
            assert (output.logits - logits)[real].abs().max() < 1e-4
        attached.detach()
        assert snapshot(llama) == before
        assert torch.equal(compiled(**inputs).logits, logits)


def in_place(model, what):
    if what == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
        return
    for part in {"model": [model], "decoder": [model.model], "layers": model.model.layers}[what]:
        part.compile(backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["layers", "model", "decoder", "forward"])
def test_a_model_compiled_in_place(what):
    """The probe of a configuration that is new runs eagerly."""
    model, inputs = tiny(rms_norm_eps=3e-6), prompt([12])
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**inputs, **options)
    in_place(model, what)
    probe_module._KNOWN.clear()
    with attach(model, PIPELINE):
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert torch.equal(model.generate(**inputs, **options), plain)


@pytest.mark.parametrize(
    "kind", ["LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification"]
)
def test_models_without_generate(llama, kind):
    """Embedding, reward and classification models are served in bare forwards."""
    torch.manual_seed(2)
    model = getattr(transformers, kind)(llama.config).eval()
    inputs = prompt([12, 9])
    real = inputs["attention_mask"].bool()
    before = snapshot(model)

    def run(model):
        found = model(**inputs)[0]
        return found[real] if found.shape[:2] == real.shape else found

    plain = run(model)
    with attach(model, PIPELINE) as attached:
        assert (run(model) - plain).abs().max() < 1e-4
        assert not hasattr(model, "generate")
        assert attached.read(**inputs).columns == 12
    assert snapshot(model) == before
    with attach(model, CachePipeline(admission=LocalAttention(window=5))):
        assert (run(model) - plain).abs().max() > 1e-3


def test_replicas_are_refused(llama):
    before = snapshot(llama)
    with pytest.raises(UnsupportedError, match="^model: DataParallel"):
        attach(torch.nn.DataParallel(llama), PIPELINE)
    assert snapshot(llama) == before


def test_a_multimodal_model_keeps_its_other_towers():
    torch.manual_seed(1)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=tiny().config, vision_config=vision, image_token_index=199,
        image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 199, 199, 199, 199, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(**inputs, **options)
    before = snapshot(model)
    with attach(model, PIPELINE):
        assert torch.equal(model.generate(**inputs, **options), plain)
        assert model.model.vision_tower.config._attn_implementation != "kvpolicy"
    assert snapshot(model) == before
