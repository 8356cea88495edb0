"""`kvpolicy plan`: what a model and its cache take at a given length."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Own, composed, errors


class Dtype(StrEnum):
    """dtypes of a cache."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def plan(
    model: Annotated[str, typer.Argument(help="A hub id or a folder; only its config is read.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each sequence.")] = 100_000,
    admitted: Annotated[
        float | None, typer.Option(help="Fraction that a learned admission admits.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    window: Annotated[int | None, typer.Option(min=1, help="Local window in tokens.")] = None,
    gate: Annotated[Path | None, typer.Option(help="A write gate's file.")] = None,
    duo: Annotated[Path | None, typer.Option(help="A DuoAttention pattern folder.")] = None,
    sparsity: Annotated[float, typer.Option(help="Streaming heads, with --duo.")] = 0.5,
    quest: Annotated[int | None, typer.Option(help="Tokens a head reads.")] = None,
    snapkv: Annotated[int | None, typer.Option(help="Tokens a head holds.")] = None,
    pipeline: Own = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and cache.")] = Dtype.bfloat16,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as JSON.")] = False,
) -> None:
    """Plan memory: what a model and its cache take at a given length."""
    with errors():
        import attrs
        import torch
        from transformers import AutoConfig

        from ..adapters.hf import fit_report

        composition = composed(window, gate, duo, sparsity, quest, snapkv, pipeline)
        result = fit_report(
            AutoConfig.from_pretrained(model),
            tokens,
            admitted=admitted,
            pipeline=composition,
            batch=batch,
            dtype=getattr(torch, dtype.value),
            page_size=page_size,
        )
        numbers = attrs.asdict(result)
        numbers |= {name: getattr(result, name) for name in ("cache", "total", "full_total")}
        if as_json:
            typer.echo(json.dumps(numbers | {"saving": result.saving}))
            return
        _print_plan(f"{model}: {batch} x {tokens:,} tokens", numbers, result.kept, result.saving)


def _print_plan(title: str, numbers: dict[str, Any], kept: float, saving: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("part", title=title)
    table.add_column("bytes", justify="right")
    table.add_column("GiB", justify="right")
    parts = ("pages", "ring", "positions", "summaries", "queries", "tables", "reserved", "cache")
    for name in (*parts, "weights", "gates", "total", "full", "full_total"):
        ends_section = name in ("reserved", "cache", "gates", "total")
        row = (name.replace("_", " "), f"{numbers[name]:,}", f"{numbers[name] / 2**30:.3f}")
        table.add_row(*row, end_section=ends_section)
    console = Console(width=80)
    console.print(table)
    console.print(f"{kept:.1%} of the tokens kept; {saving:.0%} less than weights and a full cache")
