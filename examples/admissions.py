"""Every admission, while the prompt is read and as an eviction at its end.

    python examples/admissions.py                     # a tiny random Llama, seconds, no download
    python examples/admissions.py --model smollm2 --tokens 1000    # a real model and real text

Each row is one admission on the same prompt: what it admits, what a head holds, and the bytes of
keys and values against a dense cache; then the same as `AtPromptEnd`, whose prompt is dense. Gates
are random here: `from_pretrained` reads trained ones.
"""

from __future__ import annotations

import argparse

import torch
from compose import load, random_gate, run
from rich.console import Console
from rich.table import Table

from kvpolicy import (
    AdaEA,
    Admission,
    AdmitAll,
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    DuoAttention,
    KVzap,
    LocalAttention,
    RandomGate,
    all_of,
    any_of,
    per_layer,
)
from kvpolicy.adapters.hf import spec_of

WINDOW = 32


def random_zap(spec: CacheSpec, hidden: int) -> KVzap:
    """KVzap's model with a hidden layer, never trained; at 0 it admits about half."""
    units = 16
    return KVzap(
        w1=torch.randn(spec.layers, units, hidden) / hidden**0.5,
        b1=torch.zeros(spec.layers, units),
        w2=torch.randn(spec.layers, spec.kv_heads, units),
        b2=torch.zeros(spec.layers, spec.kv_heads),
        threshold=0.0,
        window=WINDOW,
    )


def random_ada_ea(spec: CacheSpec) -> AdaEA:
    """AdaEA's statistics, random, with thresholds that admit some tokens."""
    heads = (spec.layers, spec.kv_heads, spec.heads // spec.kv_heads)
    return AdaEA(
        mean=torch.randn(*heads, spec.head_dim),
        covariance=torch.eye(spec.head_dim).expand(*heads, -1, -1) / 4,
        thresholds=torch.ones(heads),
        window=WINDOW,
    )


def admissions(spec: CacheSpec, hidden: int) -> dict[str, Admission]:
    """What the slot may hold, by name."""
    every_other = [[(n + h) % 2 == 0 for h in range(spec.kv_heads)] for n in range(spec.layers)]
    duo = DuoAttention(full_heads=every_other, sinks=4, window=WINDOW)
    local, gate = LocalAttention(window=WINDOW, sinks=4), random_gate(spec, WINDOW)
    return {
        "all": AdmitAll(),
        "local": local,
        "DuoAttention": duo,
        "random, a quarter": RandomGate(sparsity=0.75),
        "write gate": gate,
        "KVzap": random_zap(spec, hidden),
        "AdaEA": random_ada_ea(spec),
        "KVzap or DuoAttention": any_of(random_zap(spec, hidden), duo),
        "KVzap and write gate": all_of(random_zap(spec, hidden), gate),
        "local, but KVzap in layer 0": per_layer(local, {0: random_zap(spec, hidden)}),
    }


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
    dense = run(model, ids, CachePipeline(window=WINDOW), args.new_tokens)
    table = Table("admission", title=f"{ids.shape[1]} tokens; while reading, and at the end")
    for name in ("admitted", "stored", "of dense", "evicted", "stored", "of dense"):
        table.add_column(name, justify="right")
    for name, admission in admissions(spec_of(model), model.config.hidden_size).items():
        early = run(model, ids, CachePipeline(admission=admission, window=WINDOW), args.new_tokens)
        end = CachePipeline(eviction=AtPromptEnd(admission), window=WINDOW)
        late = run(model, ids, end, args.new_tokens)
        heads = sum(len(layer) for layer in early.stored)
        table.add_row(
            name,
            f"{early.mean_admitted:.0%}",
            f"{sum(map(sum, early.stored)) / heads:.0f}",
            f"{early.kv / dense.kv:.0%}",
            f"{sum(map(sum, late.evicted)) / heads:.0f}",
            f"{sum(map(sum, late.stored)) / heads:.0f}",
            f"{late.kv / dense.kv:.0%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
