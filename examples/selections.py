"""Every selection, of prompts and of decoding, alone and after an eviction.

    python examples/selections.py                     # a tiny random Llama, seconds, no download
    python examples/selections.py --model smollm2 --tokens 1000    # a real model and real text

Each row is one pipeline on the same prompt: what a head holds and what a decoded token reads of it.
A selection frees nothing; RocketKV's recipe lets SnapKV free and then reads a part of the rest.
"""

from __future__ import annotations

import argparse

import torch
from compose import load, run
from rich.console import Console
from rich.table import Table

from kvpolicy import (
    CachePipeline,
    FlexPrefill,
    PerPhase,
    Quest,
    SelectAll,
    SnapKV,
    TopChannels,
    VerticalSlash,
    XAttention,
)

WINDOW = 32


def pipelines(held: int, read: int) -> dict[str, CachePipeline]:
    """Pipelines whose heads hold `held` tokens where an eviction frees, and read `read`."""
    snap = SnapKV(budget=held, kernel=63, pooling="max")
    tiles = {"tile": 64}
    return {
        "all": CachePipeline(selection=SelectAll(), window=WINDOW),
        "Quest": CachePipeline(selection=Quest(budget=read), window=WINDOW),
        "Quest, each query head": CachePipeline(
            selection=Quest(budget=read, group="each"), window=WINDOW
        ),
        "top channels": CachePipeline(
            selection=TopChannels(budget=read, channels=8), window=WINDOW
        ),
        "SnapKV + Quest": CachePipeline(eviction=snap, selection=Quest(budget=read)),
        "RocketKV": CachePipeline(eviction=snap, selection=TopChannels(budget=read, channels=8)),
        "XAttention": CachePipeline(selection=XAttention(**tiles), window=WINDOW),
        "FlexPrefill": CachePipeline(selection=FlexPrefill(**tiles), window=WINDOW),
        "vertical-slash": CachePipeline(selection=VerticalSlash(), window=WINDOW),
        "XAttention, then Quest": CachePipeline(
            selection=PerPhase(prefill=XAttention(**tiles), decode=Quest(budget=read)),
            window=WINDOW,
        ),
        "XAttention, then RocketKV": CachePipeline(
            eviction=snap,
            selection=PerPhase(
                prefill=XAttention(**tiles), decode=TopChannels(budget=read, channels=8)
            ),
        ),
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
    held, read = max(args.tokens // 2, 96), max(args.tokens // 8, 64)
    table = Table("selection", title=f"{ids.shape[1]} tokens; per KV head")
    for name in ("stored", "evicted", "read", "K/V bytes"):
        table.add_column(name, justify="right")
    for name, pipeline in pipelines(held, read).items():
        report = run(model, ids, pipeline, args.new_tokens)
        heads = sum(len(layer) for layer in report.stored)
        table.add_row(
            name,
            f"{sum(map(sum, report.stored)) / heads:.0f}",
            f"{sum(map(sum, report.evicted)) / heads:.0f}",
            f"{report.mean_read:.0f}",
            f"{report.kv:,}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
