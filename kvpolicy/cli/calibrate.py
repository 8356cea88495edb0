"""`kvpolicy calibrate` and `kvpolicy pareto`: sizes that are wanted, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Device, Duo, Gate, Model, errors, load, read

if TYPE_CHECKING:
    from ..evaluation.search.pareto import Front, Point
    from ..pipeline import CachePipeline

Texts = Annotated[Path, typer.Option(help="A .txt file or a folder of them.", exists=True)]
AsJson = Annotated[bool, typer.Option("--json", help="The report as JSON.")]
Window = Annotated[int | None, typer.Option(min=1, help="Local window without a gate.")]


def calibrate(
    model: Model,
    texts: Texts,
    gate: Gate = None,
    duo: Duo = None,
    snapkv: Annotated[bool, typer.Option("--snapkv", help="Turn SnapKV's budget.")] = False,
    target: Annotated[
        str | None, typer.Option(help='Part of the tokens seen, window included: "25%".')
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens per head instead.")] = None,
    max_bytes: Annotated[
        float | None, typer.Option("--bytes", help="Bytes of one prompt's cache instead.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 4096,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that sizes are measured on.")] = 4,
    window: Window = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find the threshold, sparsity or budget that gives a cache of a wanted size."""
    with errors():
        import attrs

        from ..evaluation.search import calibrate as calibration
        from ..evaluation.tasks.loss import documents

        pipeline = _pipeline(gate, duo, snapkv, window)
        language_model, tokenizer = load(model, device)
        text = "\n\n".join(read(texts))
        found = calibration.calibrate(
            language_model,
            pipeline,
            documents(tokenizer, text, length=length, contexts=prompts),
            target=target,
            tokens=tokens,
            bytes=max_bytes,
            slot="eviction" if snapkv else "admission",
            pattern=duo,
        )
        if as_json:
            report = attrs.asdict(found, filter=lambda field, _: field.name != "pipeline")
            typer.echo(json.dumps(report))
            return
        best, size = found.best, found.best.size
        typer.echo(
            f"{found.knob} {best.value:.6g}: {size.tokens:.1f} tokens per head, "
            f"{size.fraction:.1%} of those seen, {size.bytes:,.0f} bytes; "
            f"{'reached' if found.reached else 'nearest to'} {found.unit} {found.target:g} "
            f"after {len(found.trials)} trials"
        )


def pareto(
    model: Model,
    gate: Annotated[Path, typer.Option(help="A write gate's file.")],
    out: Annotated[Path, typer.Option(help="Folder of the points and the plot.")],
    texts: Texts,
    threshold: Annotated[list[float] | None, typer.Option(help="Of the gate.")] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Parts of the context that SnapKV leaves.")
    ] = None,
    task: Annotated[str, typer.Option(help="What is asked.")] = "eight needles",
    length: Annotated[int, typer.Option(min=2, help="Context tokens.")] = 2048,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of a point.")] = 8,
    question_seen: Annotated[
        bool, typer.Option("--question-seen", help="The eviction knows the question.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    device: Device = None,
) -> None:
    """Measure thresholds x eviction budgets, and which of them are worth their bytes."""
    with errors():
        from ..evaluation.search import pareto as measuring
        from ..evaluation.tasks import TASKS

        asking = [name for name in TASKS if TASKS[name].questions]
        if task not in asking:
            raise ValueError(f"task: wanted one of {', '.join(asking)}, got {task!r}")
        language_model, tokenizer = load(model, device)
        examples = TASKS[task].make(
            tokenizer, "\n\n".join(read(texts)), length=length, contexts=contexts, seed=seed
        )
        parts = budget or [0.25, 0.125, 0.0625]
        found = measuring.pareto(
            language_model,
            _pipeline(gate, None, True, None),
            examples,
            admissions=threshold or [0.02, 0.05, 0.1, 0.2, 0.4],
            evictions=[None, *(round(part * length) for part in parts)],
            question_in_prompt=question_seen,
            measured=lambda point: typer.echo(_said(point)),
        )
        out.mkdir(parents=True, exist_ok=True)
        _write(out, found, f"{model}: {task}, {length} tokens")
        typer.echo(f"{out / 'pareto.json'}: {len(found.best)} of {len(found.points)} on the front")


def _pipeline(
    gate: Path | None, duo: Path | None, snapkv: bool, window: int | None
) -> CachePipeline:
    from .. import CachePipeline, DuoAttention, SnapKV, Tokens, WriteGate

    if gate and duo:
        raise ValueError("gate, duo: wanted at most one admission, got both")
    policies: dict[str, Any] = {}
    if gate:
        policies["admission"] = WriteGate.from_pretrained(gate)
    if duo:
        policies["admission"] = DuoAttention.from_pretrained(duo, sparsity=0.5)
    near = CachePipeline(window=window, **policies).window
    if snapkv:
        policies["eviction"] = SnapKV(budget=Tokens(near + 1), observation=min(32, near))
    return CachePipeline(window=window, **policies)


def _said(point: Point) -> str:
    cap = "no cap" if point.eviction is None else f"cap {point.eviction:g}"
    return (
        f"threshold {point.admission:g}, {cap}: accuracy {point.accuracy.mean:.3f}, "
        f"cache {point.fraction:.1%}"
    )


def _write(out: Path, found: Front, title: str) -> None:
    import attrs

    from ..evaluation.search.plots import front

    points = [attrs.asdict(point) | {"best": point in found.best} for point in found.points]
    record = {"knobs": found.knobs, "points": points}
    (out / "pareto.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    front(out / "pareto.png", found, title)
