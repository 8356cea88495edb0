"""Captured decoding on a GPU: the same numbers, no host syncs, one capture."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvpolicy import (
    GKV,
    H2O,
    RKV,
    CachePipeline,
    CriticalKV,
    ExpectedAttention,
    LocalAttention,
    Quest,
    RandomGate,
    SnapKV,
    WriteGate,
)
from kvpolicy.adapters.hf import attach, capture, decode_loop
from kvpolicy.store.moments import query_stats
from kvpolicy.store.numbers import held

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def write_gate(layers: int = 3, heads: int = 2, dim: int = 64, width: int = 32) -> WriteGate:
    """Random weights; the threshold is near the median of their scores."""
    g = torch.Generator().manual_seed(0)
    shapes = {"w1": (width, 2 * dim), "b1": (width,), "w2": (width,), "b2": ()}
    weights = {n: torch.randn(layers, heads, *s, generator=g) / 8 for n, s in shapes.items()}
    norm = torch.ones(layers, dim)
    return WriteGate(norm_pre=norm, norm_post=norm, threshold=0.5, window=16, **weights)


PIPELINES = {
    "write_gate": CachePipeline(admission=write_gate(), selection=Quest(budget=48)),
    "neutral": CachePipeline(window=16),
    "local": CachePipeline(admission=LocalAttention(window=16, sinks=4)),
    "gate": CachePipeline(admission=RandomGate(sparsity=0.5), window=16),
    "quest": CachePipeline(
        admission=RandomGate(sparsity=0.3), selection=Quest(budget=48), window=16
    ),
    "each": CachePipeline(selection=Quest(budget=48, group="each"), window=16),
    "snapkv": CachePipeline(eviction=SnapKV(budget=40, observation=8, when="decode"), window=16),
    "h2o": CachePipeline(
        admission=RandomGate(sparsity=0.3), eviction=H2O(budget=40, group="max"), window=16
    ),
    "g_kv": CachePipeline(eviction=GKV(budget=40, observation=8), window=16),
    "expected": CachePipeline(eviction=ExpectedAttention(budget=40, when="decode"), window=16),
    "r_kv": CachePipeline(eviction=RKV(budget=40), window=16),
    "critical": CachePipeline(
        eviction=CriticalKV(SnapKV(budget=40, observation=8, when="decode")), window=16
    ),
    "all": CachePipeline(
        admission=RandomGate(sparsity=0.3),
        selection=Quest(budget=32),
        eviction=SnapKV(budget=40, observation=8, when="decode"),
        window=16,
    ),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        initializer_range=0.1, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda").eval()


def prompt(batch: int = 2, columns: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 512, (batch, columns), generator=g).cuda()
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    return ids, mask


OPTIONS = {"max_new_tokens": 70, "do_sample": False}


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_captured_equals_eager_bit_for_bit(model, name, dtype, monkeypatch) -> None:
    model.to(dtype)
    ids, mask = prompt()
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    with attach(model, PIPELINES[name]) as attachment:
        captured = model.generate(ids, attention_mask=mask, **options)
        assert attachment.decoding == "captured"
        monkeypatch.setattr(capture, "why_not", lambda *a: "for comparison")
        eager = model.generate(ids, attention_mask=mask, **options)
        assert attachment.decoding.startswith("eager")
    assert torch.equal(captured.sequences, eager.sequences)
    for a, b in zip(captured.logits, eager.logits, strict=True):
        assert torch.equal(a, b)
    states = [x.past_key_values.state for x in (captured, eager)]
    assert states[0].lengths == states[1].lengths
    for layers in zip(*(state.layers for state in states), strict=True):
        if layers[0].numbers is not None:
            assert layers[0].eviction.remembers or held(layers[0]).any()
            assert torch.equal(*map(held, layers))
    model.float()


def test_statistics_are_summed_between_captured_steps(model, monkeypatch) -> None:
    """More tokens than the ring of queries has slots; one row ends early."""
    ids, mask = prompt()
    options = {"max_new_tokens": 420, "do_sample": False, "return_dict_in_generate": True}
    with attach(model, PIPELINES["expected"]) as attachment:
        caches = [attachment.new_cache() for _ in range(2)]
        captured = model.generate(ids, attention_mask=mask, past_key_values=caches[0], **options)
        assert caches[0].decoding == "captured"
        monkeypatch.setattr(capture, "why_not", lambda *a: "for comparison")
        eager = model.generate(ids, attention_mask=mask, past_key_values=caches[1], **options)
    assert torch.equal(captured.sequences, eager.sequences)
    states = [cache.state for cache in caches]
    assert max(row.summed for row in states[0].sequences) >= 256
    for one, other in zip(*(state.layers for state in states), strict=True):
        found = [query_stats(s, x) for s, x in zip(states, (one, other), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["write_gate", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_layers_are_captured(model, name, dtype, monkeypatch) -> None:
    """Captured equals eager bit for bit; compiled equals eager modules up to rounding."""
    model.to(dtype)
    ids, mask = prompt()
    options = {**OPTIONS, "return_dict_in_generate": True, "output_logits": True}
    with attach(model, PIPELINES[name]):
        modules = model.generate(ids, attention_mask=mask, **options)
    torch._dynamo.reset()
    counters.clear()
    with attach(model, PIPELINES[name], compile=True) as attachment:
        captured = model.generate(ids, attention_mask=mask, **options)
        assert attachment.decoding == "captured"
        model.generate(ids, attention_mask=mask, **OPTIONS)
        assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
        monkeypatch.setattr(capture, "why_not", lambda *a: "for comparison")
        eager = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(captured.sequences, eager.sequences)
    for a, b in zip(captured.logits, eager.logits, strict=True):
        assert torch.equal(a, b)
    if dtype == torch.float32 or name == "all":  # rounding decides a gate's close calls
        first, other = captured.logits[0].double(), modules.logits[0].double()
        assert (first - other).norm() <= (1e-4 if dtype == torch.float32 else 5e-2) * other.norm()
    model.float()


def test_neutral_equals_plain_generation(model) -> None:
    ids, mask = prompt()
    plain = model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(), **OPTIONS)
    with attach(model, PIPELINES["neutral"]):
        ours = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert torch.equal(plain, ours)


def test_sampling_when_captured(model) -> None:
    """The same draws as transformers' own loop from the same seed."""
    ids, mask = prompt()
    options = {**OPTIONS, "do_sample": True, "temperature": 0.7, "top_k": 20}
    torch.manual_seed(3)
    plain = model.generate(ids, attention_mask=mask, past_key_values=DynamicCache(), **options)
    with attach(model, PIPELINES["neutral"]) as attachment:
        torch.manual_seed(3)
        ours = model.generate(ids, attention_mask=mask, **options)
        assert attachment.decoding == "captured"
    assert torch.equal(plain, ours)


def test_a_second_generate_captures_nothing(model) -> None:
    ids, mask = prompt()
    with attach(model, PIPELINES["all"]) as attachment:
        first = model.generate(ids, attention_mask=mask, **OPTIONS)
        cache = attachment.idle[2]
        captures = cache.captures
        second = model.generate(ids, attention_mask=mask, **OPTIONS)
        assert attachment.idle[2] is cache and cache.captures == captures == 1
    assert torch.equal(first, second)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_decoding_does_not_sync(model, sample, compile) -> None:
    ids, mask = prompt()
    with attach(model, PIPELINES["quest"], compile=compile) as attachment, torch.no_grad():
        cache = attachment.new_cache()
        cache.begin_prompt()
        out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        cache.end_prompt()
        stepper = capture.Stepper(model, cache, mask.sum(1, keepdim=True), room=64)
        active = torch.ones(2, dtype=torch.bool, device="cuda")
        token = out.logits[:, -1].argmax(-1)
        for _ in range(4):
            token = decode_loop._choose(stepper.step(token, active)[:, -1].float(), sample)
        cache.pipeline.reserve(cache.state, 16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(16):
                token = decode_loop._choose(stepper.step(token, active)[:, -1].float(), sample)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_streamer_and_end_of_sequence(model) -> None:
    class Collect:
        def __init__(self) -> None:
            self.tokens: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens.append(value.clone())

        def end(self) -> None:
            self.tokens.append(torch.tensor([-1]))

    ids = prompt(1)[0]
    plain = model.generate(ids, **OPTIONS)
    stop = int(plain[0, ids.shape[1] + 30])
    plain = model.generate(ids, eos_token_id=stop, **OPTIONS)
    seen = Collect()
    with attach(model, PIPELINES["neutral"]):
        ours = model.generate(ids, eos_token_id=stop, streamer=seen, **OPTIONS)
    assert torch.equal(plain, ours)
    streamed = torch.cat([t.flatten() for t in seen.tokens])
    assert (
        streamed[:-1].tolist()[-(ours.shape[1] - ids.shape[1]) :]
        == ours[0, ids.shape[1] :].tolist()
    )
