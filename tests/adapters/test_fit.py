"""Planned memory: equal to what a cache reports, and to the published law."""

from __future__ import annotations

import math
import re

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM

from kvpolicy import (
    AtPromptEnd,
    CachePipeline,
    DuoAttention,
    LocalAttention,
    Quest,
    RandomGate,
    Ratio,
    SnapKV,
    TotalCap,
    WriteGate,
    per_layer,
)
from kvpolicy.adapters.hf import attach, fit_report, new_cache
from kvpolicy.evaluation.models import tiny_llama

DUO = DuoAttention(full_heads=[[True, False], [False, False]], sinks=20, window=32)
PIPELINES = {
    "dense": CachePipeline(window=32),
    "local": CachePipeline(admission=LocalAttention(window=32, sinks=20)),
    "duo": CachePipeline(admission=DUO),
    "random+quest": CachePipeline(
        admission=RandomGate(sparsity=0.7), selection=Quest(budget=64), window=32
    ),
    "snapkv": CachePipeline(eviction=SnapKV(budget=96, observation=8), window=32),
    "snapkv ratio": CachePipeline(eviction=SnapKV(budget=Ratio(0.3)), window=32),
    "total cap": CachePipeline(eviction=SnapKV(budget=TotalCap(900)), window=32),
    "duo at prompt end": CachePipeline(eviction=AtPromptEnd(DUO)),
    "per layer": CachePipeline(admission=per_layer(DUO, {1: RandomGate(sparsity=0.5)})),
}


def prefilled(model, pipeline: CachePipeline, tokens: int, batch: int):
    with attach(model, pipeline), torch.no_grad():
        cache = new_cache(model, pipeline)
        ids = torch.randint(2, 500, (batch, tokens))
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        before = cache.report()
        cache.end_prompt()
        return before, cache.report()


@pytest.mark.parametrize("tokens", [20, 333])
@pytest.mark.parametrize("name", PIPELINES)
def test_plan_equals_the_report(name: str, tokens: int) -> None:
    pipeline, model = PIPELINES[name], tiny_llama()
    before, after = prefilled(model, pipeline, tokens, 2)
    plan = fit_report(model, tokens, pipeline=pipeline, batch=2)
    for part in ("pages", "ring", "positions", "summaries", "queries"):
        assert getattr(plan, part) == getattr(after, part), part
    assert plan.prompt_pages == before.pages
    assert plan.kept == pytest.approx(sum(map(sum, after.stored)) / (4 * tokens))
    assert plan.reserved >= after.reserved
    assert 0 <= plan.tables - after.tables < 4096
    assert plan.weights == sum(p.numel() for p in model.parameters()) * 4
    assert plan.full == after.dense == 2 * 2 * 2 * tokens * 2 * 32 * 4


def test_layers_that_slide_hold_a_ring_only() -> None:
    shape = tiny_llama().config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: shape[name] for name in (*names, "num_key_value_heads", "vocab_size")}
    model = MistralForCausalLM(MistralConfig(sliding_window=48, **sizes)).eval()
    _, report = prefilled(model, CachePipeline(window=32), 200, 1)
    plan = fit_report(model, 200, pipeline=CachePipeline(window=32))
    assert (plan.pages, plan.ring) == (report.pages, report.ring) == (0, plan.ring)
    assert plan.kept == pytest.approx(48 / 200)
    ordinary = model(torch.randint(2, 500, (1, 200)), use_cache=True).past_key_values
    held = sum(x.keys.nbytes + x.values.nbytes for x in ordinary.layers)
    # transformers forgets a token as soon as the next one cannot see it.
    assert plan.full == report.dense == held * 48 // 47


# Llama-3.1-8B with the published gates: tokens, fraction of K and V held (window included),
# reduction of weights and cache together (WG-KV README, memory at 100K to 400K).
PUBLISHED = [
    (100_000, 2.51 / 12.54, 0.36),
    (200_000, 5.15 / 25.05, 0.49),
    (300_000, 7.74 / 37.56, 0.56),
    (400_000, 10.52 / 50.06, 0.60),
]


@pytest.mark.parametrize(("tokens", "kept", "saving"), PUBLISHED)
def test_published_memory_follows_from_sizes(tokens: int, kept: float, saving: float) -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    shapes = {
        "norm_pre": (32, 128),
        "norm_post": (32, 128),
        "w1": (32, 8, 512, 256),
        "b1": (32, 8, 512),
        "w2": (32, 8, 512),
        "b2": (32, 8),
    }
    gate = WriteGate(**{name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    admitted = (kept * tokens - 256) / (tokens - 256)
    plan = fit_report(
        config,
        tokens,
        admitted=admitted,
        pipeline=CachePipeline(admission=gate),
        dtype=torch.bfloat16,
        rollback=0,
    )
    assert plan.gates == 33_825_024 * 2
    assert plan.weights == pytest.approx(15_316.51 * 2**20, rel=1e-5)
    assert plan.kept == pytest.approx(kept, abs=1e-4)
    # Every head is rounded up to a page.
    held = plan.kept * plan.full
    assert held <= plan.pages + plan.ring <= held * 1.001 + 256 * 16 * 512
    law = 1 - (plan.weights + plan.gates + kept * plan.full) / plan.full_total
    assert law == pytest.approx(saving, abs=0.006)
    assert law - 0.015 < plan.saving < law  # positions, tables and reserve come on top


def test_config_alone_gives_the_models_numbers() -> None:
    model = tiny_llama()
    from_model = fit_report(model, 1000, admitted=0.25)
    from_config = fit_report(model.config, 1000, admitted=0.25, dtype=torch.float32)
    assert (from_config.weights, from_config.cache - from_config.tables) == (
        from_model.weights,
        from_model.cache - from_model.tables,
    )
    assert from_model.total == from_model.weights + from_model.cache
    assert math.isclose(from_model.saving, 1 - from_model.total / from_model.full_total)
    assert from_model.kept == pytest.approx((256 + 0.25 * 744) / 1000)


def test_a_plan_prints_what_it_holds() -> None:
    plan = fit_report(tiny_llama(), 1000, admitted=0.25)
    said = str(plan)
    assert said.startswith(f"1 x 1,000 tokens: {plan.kept:.1%} of the tokens kept; ")
    for name in ("full", "pages", "cache", "weights", "total"):
        assert re.search(rf"\b{getattr(plan, name):,} ", said), name
    assert plan._repr_html_().count("<tr>") == len([x for x in said.split("\n") if x]) - 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens": 0}, "tokens: wanted at least 1"),
        ({"tokens": 9, "batch": 0}, "batch: wanted at least 1"),
        ({"tokens": 9, "admitted": 1.5}, "admitted: wanted a fraction"),
        ({"tokens": 9, "admitted": 0.5, "pipeline": CachePipeline()}, "follows from positions"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_report(tiny_llama(), **kwargs)


def test_a_learned_admission_needs_its_fraction() -> None:
    shapes = {
        "norm_pre": (2, 32),
        "norm_post": (2, 32),
        "w1": (2, 2, 4, 64),
        "b1": (2, 2, 4),
        "w2": (2, 2, 4),
        "b2": (2, 2),
    }
    gate = WriteGate(**{name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match="WriteGate admits, got None"):
        fit_report(tiny_llama(), 100, pipeline=CachePipeline(admission=gate))
    misfit = WriteGate(**{n: getattr(gate, n)[:1] for n in shapes})
    with pytest.raises(ValueError, match="layers=1"):
        fit_report(tiny_llama(), 100, admitted=0.5, pipeline=CachePipeline(admission=misfit))
