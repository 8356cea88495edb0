"""`kvpolicy calibrate` and `kvpolicy pareto`: sizes that are wanted, and what they cost."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._fields import MOST
from .._files import write_text
from .common import (
    Device,
    Duo,
    Gate,
    Model,
    OfWeights,
    Own,
    Texts,
    Trust,
    Window,
    check_fractions,
    errors,
    load,
    read,
    shipped,
)
from .own import own_pipeline
from .progress import Asked, Progress

if TYPE_CHECKING:
    from ..evaluation.search.pareto import Front, Point
    from ..pipeline import CachePipeline

TRIALS = 12  # at most
AsJson = Annotated[bool, typer.Option("--json", help="The report as JSON.")]


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
    length: Annotated[int, typer.Option(min=2, max=MOST, help="Tokens of a prompt.")] = 4096,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that sizes are measured on.")] = 4,
    window: Window = None,
    pipeline: Own = None,
    trust_code: Trust = False,
    slot: Annotated[
        str | None, typer.Option(help='What of --pipeline is turned: "admission" or "eviction".')
    ] = None,
    device: Device = None,
    dtype: OfWeights = None,
    as_json: AsJson = False,
    progress: Asked = None,
) -> None:
    """Find the threshold, sparsity or budget that gives a cache of a wanted size."""
    with errors():
        import attrs

        from ..evaluation.search import calibrate as calibration
        from ..evaluation.tasks.loss import documents

        if pipeline is None:
            turned = _pipeline(gate, duo, snapkv, window)
            slot = "eviction" if snapkv else "admission"
        elif gate or duo or snapkv or window:
            raise ValueError("pipeline: wanted no window and no policies beside it")
        else:
            turned = own_pipeline(pipeline, trust_code)
        pattern = None if duo is None else shipped("duo", duo)
        calibration.target_of(target, tokens, max_bytes)  # before a model is loaded for nothing
        with Progress("trial", asked=progress) as shown:
            shown.doing(f"loading {model}")
            language_model, tokenizer = load(model, device, dtype)
            text = "\n\n".join(read(texts))
            asked = documents(tokenizer, text, length=length, contexts=prompts)
            shown.doing(f"reading {prompts} x {length:,} tokens")
            shown.begin(TRIALS)
            tried = itertools.count(1)
            found = calibration.calibrate(
                language_model,
                turned,
                asked,
                target=target,
                tokens=tokens,
                bytes=max_bytes,
                slot=slot,
                pattern=pattern,
                trials=TRIALS,
                measured=lambda trial: shown.done(
                    next(tried), f"{trial.value:.4g} holds {trial.size.fraction:.1%}"
                ),
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
    out: Annotated[Path, typer.Option(help="Folder of the points and the plot.")],
    texts: Texts,
    gate: Gate = None,
    pipeline: Own = None,
    trust_code: Trust = False,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Of the gate, or values of an admission of yours.")
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Parts of the context that the eviction leaves.")
    ] = None,
    task: Annotated[str, typer.Option(help="What is asked.")] = "eight needles",
    length: Annotated[int, typer.Option(min=2, max=MOST, help="Context tokens.")] = 2048,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of a point.")] = 8,
    question_seen: Annotated[
        bool, typer.Option("--question-seen", help="The eviction knows the question.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 0,
    device: Device = None,
    dtype: OfWeights = None,
    progress: Asked = None,
) -> None:
    """Measure thresholds x eviction budgets, and which of them are worth their bytes."""
    with errors():
        from ..evaluation.search import pareto as measuring
        from ..evaluation.tasks import TASKS

        asking = [name for name in TASKS if TASKS[name].questions]
        if task not in asking:
            raise ValueError(f"task: wanted one of {', '.join(asking)}, got {task!r}")
        if (gate is None) == (pipeline is None):
            raise ValueError("gate, pipeline: wanted exactly one; add --gate FILE or NAME")
        measured = (
            _pipeline(gate, None, True, None) if gate else own_pipeline(str(pipeline), trust_code)
        )
        parts = budget or [0.25, 0.125, 0.0625]
        check_fractions("budget", parts)
        admissions = threshold or [0.02, 0.05, 0.1, 0.2, 0.4]
        evictions = [None, *(round(part * length) for part in parts)]
        with Progress("point", asked=progress) as shown:
            shown.doing(f"loading {model}")
            language_model, tokenizer = load(model, device, dtype)
            examples = TASKS[task].make(
                tokenizer, "\n\n".join(read(texts)), length=length, contexts=contexts, seed=seed
            )
            shown.doing(f"asking {contexts} x {length:,} tokens")
            shown.begin(len(admissions) * len(evictions))
            points = itertools.count(1)

            def told(point: Point) -> None:
                typer.echo(_said(point))
                shown.done(next(points), f"threshold {point.admission:g}")

            found = measuring.pareto(
                language_model,
                measured,
                examples,
                admissions=admissions,
                evictions=evictions,
                question_in_prompt=question_seen,
                measured=told,
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
        policies["admission"] = WriteGate.from_pretrained(shipped("gate", gate))
    if duo:
        policies["admission"] = DuoAttention.from_pretrained(shipped("duo", duo), sparsity=0.5)
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
    full = None if found.full is None else attrs.asdict(found.full)
    record = {"knobs": found.knobs, "points": points, "full": full}
    write_text(out / "pareto.json", json.dumps(record, indent=1))
    front(out / "pareto.png", found, title)
