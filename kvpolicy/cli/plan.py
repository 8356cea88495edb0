"""`kvpolicy plan`: what a model and its cache take at a given length."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .._fields import MOST
from .common import (
    SMOLLM2,
    Dtype,
    Duo,
    Gate,
    Own,
    QuestTokens,
    SnapKVTokens,
    Sparsity,
    Trust,
    Window,
    composed,
    config_of,
    errors,
)


def plan(
    model: Annotated[
        str, typer.Argument(help=f'A hub id, a folder or "{SMOLLM2}"; only its config is read.')
    ],
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens of each sequence.")
    ] = 100_000,
    admitted: Annotated[
        float | None, typer.Option(help="Fraction that a learned admission admits.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1 << 16, help="Sequences.")] = 1,
    window: Window = None,
    gate: Gate = None,
    duo: Duo = None,
    sparsity: Sparsity = 0.5,
    quest: QuestTokens = None,
    snapkv: SnapKVTokens = None,
    pipeline: Own = None,
    trust_code: Trust = False,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and cache.")] = Dtype.bfloat16,
    page_size: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a page.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as JSON.")] = False,
) -> None:
    """Plan memory: what a model and its cache take at a given length."""
    with errors():
        import attrs
        import torch

        from ..adapters.hf import fit_report

        composition = composed(window, gate, duo, sparsity, quest, snapkv, pipeline, trust_code)
        result = fit_report(
            config_of(model),
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
