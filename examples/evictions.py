"""Every eviction at a quarter of the prompt, alone and behind an admission with a selection.

    python examples/evictions.py                      # a tiny random Llama, seconds, no download
    python examples/evictions.py --model smollm2 --tokens 1000    # a real model and real text

Each row is one method on the same prompt: what a head holds, what went, and the bytes of keys and
values against a dense cache; then the same behind a gate that admits a half, with Quest reading a
part of what is left. docs/policies.md says what each of them decides.
"""

from __future__ import annotations

import argparse

import torch
from compose import load, run
from rich.console import Console
from rich.table import Table

from kvpolicy import (
    GKV,
    H2O,
    RKV,
    TOVA,
    AcrossLayers,
    Adaptive,
    CachePipeline,
    CriticalKV,
    DBudgetKV,
    Eviction,
    ExpectedAttention,
    FastGen,
    KeyDiff,
    Knorm,
    LagKV,
    LazyLayers,
    Pyramid,
    Quest,
    RandomGate,
    Ratio,
    Report,
    SageKV,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    Tokens,
)


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
        "CriticalKV": CriticalKV(ExpectedAttention(budget=half)),
        "R-KV": RKV(budget=half),
        "G-KV": GKV(budget=half),
        "LagKV": LagKV(budget=half, lag=32),
        "DBudgetKV, 10 %": DBudgetKV(threshold=0.1),
        "FastGen, .5": FastGen(recovery=0.5),
        "SimLayerKV, .2": SimLayerKV(threshold=0.2, recent=held - 4),
        "SnapKV, a quarter": SnapKV(budget=Ratio(0.25), when="decode"),
    }


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
    for name, eviction in evictions(held).items():
        alone = CachePipeline(eviction=eviction, window=window)
        both = CachePipeline(admission=gate, selection=quest, eviction=eviction, window=window)
        found = [run(model, ids, pipeline, args.new_tokens) for pipeline in (alone, both)]
        table.add_row(name, *(cell for report in found for cell in cells(report, dense)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
