"""Models of every kind whose weights are elsewhere: offloaded by accelerate, or quantised."""

from __future__ import annotations

from types import SimpleNamespace

import accelerate
import attrs
import pytest
import torch

from kvpolicy import CachePipeline, LocalAttention
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.probe import probe
from kvpolicy.adapters.hf.rule.tiny import tiny_model

KINDS = (
    "gemma2", "gpt_oss", "llama4_text", "qwen3_5_text", "falcon_h1", "mimo_v2_flash",
    "gemma3n_text", "phi3",
)  # fmt: skip
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompt():
    return torch.randint(20, 60, (1, 21), generator=torch.Generator().manual_seed(1))


def offloaded(model, where, folder):
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def records(found):
    """Without where a weight was when it was asked."""
    return [attrs.evolve(x, device=torch.device("cpu")) for x in found.layers]


# transformers' own generate of an offloaded Llama 4 sends ids to where its embeddings are not.
OFFLOADED = [name for name in KINDS if name != "llama4_text"]
FAST = ("gpt_oss", "gemma3n_text")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param(name, where, marks=() if name in FAST and where == "cpu" else pytest.mark.slow)
        for name in OFFLOADED
        for where in ("cpu", "disk")
    ],
)
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids`:UserWarning")
def test_offloaded_models_are_probed_as_they_run(name, where, tmp_path):
    whole = tiny_model(name).eval()
    wanted = probe(whole, again=True)
    plain = whole.generate(input_ids=prompt(), **GREEDY)
    local = CachePipeline(admission=LocalAttention(window=5))
    with attach(whole, local):
        kept = whole.generate(input_ids=prompt(), **GREEDY)
    model = offloaded(whole, where, tmp_path)
    assert any(weight.device.type == "meta" for weight in model.parameters())
    found = probe(model, again=True)
    assert records(found) == records(wanted) and found.kinds == wanted.kinds
    for pipeline, tokens in ((CachePipeline(window=5), plain), (local, kept)):
        with attach(model, pipeline):
            assert torch.equal(model.generate(input_ids=prompt(), **GREEDY), tokens)


class Eight(torch.nn.Module):
    """A linear layer of eight bits a weight, under a name of its own as quantisers keep them."""

    def __init__(self, linear):
        super().__init__()
        self.scale = float(linear.weight.abs().max()) / 127
        self.register_buffer("qweight", (linear.weight.data / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        weight = self.qweight.to(x.dtype) * self.scale
        return torch.nn.functional.linear(x, weight, self.bias)


@pytest.mark.parametrize("name", KINDS)
def test_quantised_projections(name):
    model = tiny_model(name).eval()
    for module in list(model.modules()):
        for part, linear in list(module.named_children()):
            if type(linear) is torch.nn.Linear and part.endswith("_proj"):
                setattr(module, part, Eight(linear))
    model.hf_quantizer = SimpleNamespace(is_compileable=False)
    plain = model.generate(input_ids=prompt(), **GREEDY)
    found = probe(model, again=True)
    assert found.way == "in place"
    assert all(layer.pre_rope is not None for layer in found.stored)
    with attach(model, CachePipeline(window=5)):
        assert torch.equal(model.generate(input_ids=prompt(), **GREEDY), plain)
