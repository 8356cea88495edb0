"""Models whose linear layers hold 4 bits a weight."""

from __future__ import annotations

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kvpolicy import CachePipeline, LocalAttention
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import snapshot
from tests.support.adapters.models import SIZES, error, pipelines, prompt, tiny

bitsandbytes = pytest.importorskip("bitsandbytes")

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def plain():
    return tiny("llama", intermediate_size=128)  # the kernels take whole blocks of weights


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A tiny Llama in NF4, as transformers loads it."""
    folder = tmp_path_factory.mktemp("model")
    plain().save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    return model.eval()


def test_neutral_is_the_plain_quantised_model(quantised):
    assert isinstance(quantised.model.layers[0].self_attn.k_proj, bitsandbytes.nn.Linear4bit)
    inputs = {**prompt([33, 21]), "max_new_tokens": 12, **GREEDY}
    wanted = quantised.generate(**inputs)
    assert error(wanted, plain().generate(**inputs)) > 2e-1, "nothing was quantised"
    before = snapshot(quantised)
    with attach(quantised, CachePipeline(window=5), **SIZES):
        out = quantised.generate(**inputs)
    assert torch.equal(out.sequences, wanted.sequences)
    # The layers' kernels round activations to bfloat16, which amplifies differences of 1e-7.
    assert error(out, wanted) < 2e-2
    assert snapshot(quantised) == before
    with attach(quantised, CachePipeline(admission=LocalAttention(window=5)), **SIZES):
        assert error(quantised.generate(**inputs), wanted) > 2e-1


def test_the_write_gate_reads_keys_of_quantised_layers(quantised, monkeypatch):
    """What reaches the policy is what `k_proj` says, and it leaves tokens out."""
    pipeline, seen, wanted = pipelines()["gate"], [], []
    admit = type(pipeline.admission).admit

    def spy(self, write):
        seen.append(write.key_pre)
        return admit(self, write)

    monkeypatch.setattr(type(pipeline.admission), "admit", spy)
    handles = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda m, a, out: wanted.append(out.view(-1, 2, 16).transpose(0, 1).clone())
        )
        for layer in quantised.model.layers
    ]
    try:
        with attach(quantised, pipeline, **SIZES) as attached:
            cache = attached.new_cache()
            quantised.generate(**prompt([33]), past_key_values=cache, max_new_tokens=3, **GREEDY)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(wanted) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    kept = [len(cache.state.kept(x, 0, h)) for x in (0, 1) for h in (0, 1)]
    assert min(kept) > 5 and max(kept) < 35


class Packed(torch.nn.Module):
    """A linear layer whose weights have another name, as GPTQ, AWQ and HQQ keep them."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", (linear.weight.data * 100).round().to(torch.int8))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.qweight.to(x.dtype) / 100)


def test_layers_without_a_weight():
    model, inputs = exchanged(plain(), Packed), {**prompt([33, 21]), "max_new_tokens": 6, **GREEDY}
    wanted = model.generate(**inputs)
    with attach(model, CachePipeline(window=5), **SIZES):
        assert error(model.generate(**inputs), wanted) < 1e-3


class Eighths(torch.Tensor):
    """Weights as optimum-quanto keeps them: a float tensor to all who ask, integers inside."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data, scale):
        self.data_, self.scale_ = data, scale

    def dequantize(self):
        return self.data_.to(self.scale_.dtype) * self.scale_

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale_)
        plain = [x.dequantize() if isinstance(x, cls) else x for x in args]
        return function(*plain, **(kwargs or {}))


class QLinear(torch.nn.Linear):
    """A layer of such weights, frozen."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.data
        scale = weight.abs().amax(1, keepdim=True) / 7
        made = Eighths((weight / scale).round().to(torch.int8), scale)
        self.weight = torch.nn.Parameter(made, requires_grad=False)


def exchanged(model, kind):
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, kind(child))
    return model


@pytest.mark.parametrize("name", ["stand-in", "quanto"])
def test_weights_that_are_no_plain_tensors(name):
    model, inputs = plain(), {**prompt([33, 21]), "max_new_tokens": 6, **GREEDY}
    exact = model.generate(**inputs)
    if name == "quanto":
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(model, weights=quanto.qint8)
        quanto.freeze(model)
    else:
        exchanged(model, QLinear)
    wanted = model.generate(**inputs)
    assert error(wanted, exact) > 1e-2, "nothing was quantised"
    with attach(model, CachePipeline(window=5), **SIZES) as attached:
        assert error(model.generate(**inputs), wanted) < 1e-3
        assert attached.spec.dtype == torch.float32
    with attach(model, pipelines()["gate"], **SIZES):
        assert error(model.generate(**inputs), wanted) > 1e-2


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
def test_offloaded_layers():
    """Weights lie elsewhere between calls; the cache is where the layers run."""
    model = plain()
    inputs = {**prompt([33, 21]), "max_new_tokens": 6, **GREEDY}
    wanted = model.generate(**inputs)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with attach(model, pipelines()["gate"], **SIZES) as attached:
        assert attached.spec.device == torch.device("cpu")
        model.generate(**inputs)
    with attach(model, CachePipeline(window=5), **SIZES):
        assert error(model.generate(**inputs), wanted) < 1e-3
