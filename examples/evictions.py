"""Every eviction at a quarter of the prompt, alone and behind an admission with a selection.

    python examples/evictions.py                      # a tiny random Llama, seconds, no download
    python examples/evictions.py --model smollm2 --tokens 1000    # a real model and real text

Each row is one method on the same prompt: what a head holds, what went, and the bytes of keys and
values against a dense cache; then the same behind a gate that admits a half, with Quest reading a
part of what is left. Files of methods are random here: `from_pretrained` reads fitted ones. KVzip
and Judge Q look back at the prompt before it ends. docs/policies.md says what each decides.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from compose import load, random_gate, run
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kvpolicy import (
    GKV,
    H2O,
    LUKV,
    RKV,
    TOVA,
    AcrossLayers,
    Adaptive,
    CachePipeline,
    CacheSpec,
    CapKV,
    CriticalKV,
    DBudgetKV,
    Eviction,
    ExpectedAttention,
    FastGen,
    FastKVzip,
    HeadKV,
    JudgeQ,
    KeyDiff,
    Knorm,
    KVPress,
    KVzip,
    LagKV,
    LazyLayers,
    Pyramid,
    QFilters,
    Quest,
    RandomGate,
    Ranked,
    Ratio,
    Report,
    SageKV,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    Tokens,
    TriAttention,
    TrimKV,
)
from kvpolicy.adapters.hf import attach, spec_of


def evictions(held: int) -> dict[str, Eviction]:
    """Methods that leave `held` tokens a head, window included, or what they find themselves."""
    half = Tokens(held)
    return {
        "StreamingLLM": StreamingLLM(budget=half),
        "SnapKV": SnapKV(budget=half),
        "SnapKV, AdaKV": SnapKV(budget=Adaptive(half)),
        "SnapKV, PyramidKV": SnapKV(budget=Pyramid(half)),
        "SnapKV, across layers": SnapKV(budget=AcrossLayers(half)),
        "SnapKV, lazy layers": SnapKV(budget=LazyLayers(half)),
        "TOVA": TOVA(budget=half),
        "H2O": H2O(budget=half),
        "SAGE-KV": SageKV(budget=half),
        "KeyDiff": KeyDiff(budget=half),
        "KeyDiff, AdaKV": KeyDiff(budget=Adaptive(half)),
        "Knorm": Knorm(budget=half),
        "Expected Attention": ExpectedAttention(budget=half),
        "CapKV": CapKV(budget=half),
        "CriticalKV": CriticalKV(ExpectedAttention(budget=half)),
        "R-KV": RKV(budget=half),
        "G-KV": GKV(budget=half),
        "LagKV": LagKV(budget=half, lag=32),
        "DBudgetKV, 10 %": DBudgetKV(threshold=0.1),
        "FastGen, .5": FastGen(recovery=0.5),
        "SimLayerKV, .2": SimLayerKV(threshold=0.2, recent=held - 4),
        "SnapKV, a quarter": SnapKV(budget=Ratio(0.25), when="decode"),
    }


class SmallKeys:
    """A press of one's own, with kvpress's signature: small keys stay."""

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, *rest: Any
    ) -> Tensor:
        return -keys.norm(dim=-1)


def of_files(spec: CacheSpec, hidden: int, held: int) -> dict[str, Eviction]:
    """Methods that are read from a file of the model, with random numbers, and those that wrap."""
    budget = Tokens(held)
    layers, heads, dim = spec.layers, spec.kv_heads, spec.head_dim
    group, small = spec.heads // heads, 8
    worth = [[1.0 + n + h for h in range(heads)] for n in range(layers)]
    parts = [[0.2 + 0.4 * ((n + h) % 2) for h in range(heads)] for n in range(layers)]
    real, imaginary = torch.randn(2, layers, spec.heads, dim // 2)
    return {
        "KVzip": KVzip(budget=budget),
        "Judge Q": JudgeQ(budget=budget, embeds=torch.randn(4, hidden) / hidden**0.5),
        "Q-Filters": QFilters(budget=budget, filters=torch.randn(layers, heads, dim)),
        "TriAttention": TriAttention(
            budget=budget, real=real, imaginary=imaginary, size=torch.hypot(real, imaginary) + 0.1
        ),
        "Fast KVzip": FastKVzip(
            budget=budget,
            q=torch.randn(layers, spec.heads * small, hidden) / hidden**0.5,
            q_bias=torch.zeros(layers, spec.heads * small),
            k=torch.randn(layers, heads * small, hidden) / hidden**0.5,
            q_norm=torch.ones(layers, small),
            k_norm=torch.ones(layers, small),
            base=torch.randn(layers, heads, 1, 4, small),
            bias=torch.zeros(layers, heads, 1, group),
        ),
        "TRIM-KV": TrimKV(
            budget=budget,
            w1=torch.randn(layers, small, hidden) / hidden**0.5,
            b1=torch.zeros(layers, small),
            w2=torch.randn(layers, heads, small),
            b2=torch.zeros(layers, heads),
        ),
        "Ranked by a gate": Ranked(gate=random_gate(spec, 32), budget=budget),
        "SnapKV, HeadKV": SnapKV(budget=HeadKV(budget, importance=worth)),
        "SnapKV, LU-KV": SnapKV(budget=LUKV(parts)),
        "a press": KVPress(press=SmallKeys(), budget=budget),
    }


def looked_back(model: nn.Module, ids: Tensor, pipeline: CachePipeline, new_tokens: int) -> Report:
    """As `run`, where tokens look back at the prompt before it ends."""
    eviction = pipeline.eviction
    if not eviction.replayed:
        return run(model, ids, pipeline, new_tokens)
    with attach(model, pipeline) as attached:
        cache = attached.new_cache()
        cache.begin_prompt()
        attached.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        if isinstance(eviction, JudgeQ):
            soft = eviction.embeds_for(len(ids)).to(model.device, model.dtype)
            attached.replay(cache, inputs_embeds=soft, sinks=0)
        else:  # the prompt again, without the request that `repeats` puts before it
            attached.replay(cache, ids, span=range(ids.shape[1]))
        cache.end_prompt()
        told = {"max_new_tokens": new_tokens, "do_sample": False, "return_dict_in_generate": True}
        return attached.ask(cache, ids[:, :1], **told).past_key_values.report()


def cells(report: Report, dense: Report) -> list[str]:
    """Tokens that a head holds, lost and reads, and bytes of keys and values."""
    heads = sum(len(layer) for layer in report.stored)
    return [
        f"{sum(map(sum, report.stored)) / heads:.0f}",
        f"{sum(map(sum, report.evicted)) / heads:.0f}",
        f"{report.mean_read:.0f}",
        f"{report.kv / dense.kv:.0%}",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="smollm2, a folder, or a model of the hub")
    parser.add_argument("--tokens", type=int, default=600, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=20)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, ids = load(args.model, args.tokens)
    window, held = 32, max(args.tokens // 4, 48)
    dense = run(model, ids, CachePipeline(window=window), args.new_tokens)
    table = Table("eviction", title=f"{ids.shape[1]} tokens, {held} a head; alone, and composed")
    for name in ("stored", "evicted", "read", "of dense") * 2:
        table.add_column(name, justify="right")
    gate, quest = RandomGate(sparsity=0.5), Quest(budget=window + held // 4)
    spec = spec_of(model)
    every = evictions(held) | of_files(spec, model.config.hidden_size, held)
    for name, eviction in every.items():
        alone = CachePipeline(eviction=eviction, window=window)
        both = CachePipeline(admission=gate, selection=quest, eviction=eviction, window=window)
        found = [looked_back(model, ids, x, args.new_tokens) for x in (alone, both)]
        table.add_row(name, *(cell for report in found for cell in cells(report, dense)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
