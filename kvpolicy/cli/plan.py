"""`kvpolicy plan`: what a model and its cache take at a given length."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._fields import MOST
from .._table import Section, Table, size
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

if TYPE_CHECKING:
    from ..adapters.hf import FitReport
    from ..pipeline import CachePipeline

FRACTIONS = (0.05, 0.1, 0.25, 0.5)


def plan(
    model: Annotated[
        str, typer.Argument(help=f'A hub id, a folder or "{SMOLLM2}"; only its config is read.')
    ],
    tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens of each sequence.")
    ] = 100_000,
    admitted: Annotated[
        float | None,
        typer.Option(help="Fraction that a learned admission admits; 0.25: a quarter."),
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
    """Plan memory: what a model and its cache take at a given length.

    What a gate admits depends on the text, so --admitted says which fraction to assume; without it
    the plan shows several. The shipped gates' names say what they hold of ordinary texts (keep25: a
    quarter); of a text of yours `kvpolicy inspect` measures it.
    """
    with errors():
        import attrs
        import torch

        from ..adapters.hf import fit_report
        from ..adapters.hf.memory import Learned

        composition = composed(window, gate, duo, sparsity, quest, snapkv, pipeline, trust_code)
        if composition is not None and admitted is not None and composition.admission.neutral:
            composition = attrs.evolve(composition, admission=Learned())
        config = config_of(model)

        def planned(part: float | None) -> FitReport:
            return fit_report(
                config,
                tokens,
                admitted=part,
                pipeline=composition,
                batch=batch,
                dtype=getattr(torch, dtype.value),
                page_size=page_size,
            )

        unknown = composition is not None and admitted is None and learned(composition)
        if unknown and not as_json:
            typer.echo(_several({part: planned(part) for part in FRACTIONS}, model))
            return
        result = planned(admitted)
        typer.echo(json.dumps(_numbers(result)) if as_json else f"{model}, {result}")


def learned(pipeline: CachePipeline) -> bool:
    """Whether what is admitted depends on the text."""
    deciding = (pipeline.admission, pipeline.eviction.admission)
    return not all(x is None or x.by_position for x in deciding)


def _numbers(result: FitReport) -> dict[str, Any]:
    import attrs

    more = {name: getattr(result, name) for name in ("cache", "total", "full_total", "saving")}
    return attrs.asdict(result) | more


def _several(found: dict[float, FitReport], model: str) -> str:
    """A row for each fraction that an admission may admit, and how to find one's own."""
    rows = [
        (f"{part:.0%}", f"{x.kept:.1%}", size(x.cache), size(x.total), f"{x.saving:.0%}")
        for part, x in found.items()
    ]
    whole = next(iter(found.values()))
    full = ("ordinary cache", "100.0%", size(whole.full), size(whole.full_total), "0%")
    heads = ("admitted", "kept", "cache", "with weights", "saved")
    table = Table(
        title=f"{model}, {whole.batch:,} x {whole.tokens:,} tokens, by what the gate admits",
        sections=[Section(heads=heads, rows=[*rows, full])],
    )
    return (
        f"{table.text()}\n\nWhat a gate admits depends on the text: --admitted 0.25 plans for a "
        "quarter, in full.\nIts name or its training says what to expect (keep25: a quarter of "
        "the cache is held);\nkvpolicy inspect MODEL --texts FILE --out FOLDER --gate GATE "
        "measures it on a text of yours."
    )
