"""`kvpolicy ablate`: what one setting of a write gate is worth."""

from __future__ import annotations

import hashlib
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .._fields import check_number
from .common import SMOLLM2, Device, OfWeights, errors, load, read


class Ablation(StrEnum):
    """What is varied."""

    lam = "lambda"
    window = "window"
    width = "width"
    inputs = "inputs"
    baselines = "baselines"
    shift = "shift"
    adaptive_tau = "adaptive-tau"
    pareto = "pareto"


def ablate(
    what: Annotated[
        Ablation,
        typer.Argument(help="lambda (with tau), window, width, inputs, baselines, shift, ..."),
    ],
    model: Annotated[str, typer.Option(help="A hub id, a folder or smollm2.")] = SMOLLM2,
    texts: Annotated[
        Path | None, typer.Option(help="Texts to train on: a .txt file or a folder.", exists=True)
    ] = None,
    asked: Annotated[
        Path | None,
        typer.Option(help="Texts to ask about; default Python's manual.", exists=True),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: a kind of text of yours, for shift and adaptive-tau."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of gates and results; a run goes on.", file_okay=False)
    ] = Path("ablations"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of each training.")] = 300,
    train_length: Annotated[int, typer.Option(min=2, help="Tokens of a training sequence.")] = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a held-out document.")] = 4096,
    contexts: Annotated[int, typer.Option(min=1, help="Documents and contexts a point.")] = 25,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
    minutes: Annotated[float, typer.Option(help="Time limit.")] = 60.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny random model and two steps, offline.")
    ] = False,
    device: Device = None,
    dtype: OfWeights = None,
) -> None:
    """Train short gates that differ in one thing, and measure what it is worth.

    Exits with 1 where the time was over first; the next run with the same folder goes on.
    """
    began = time.monotonic()
    with errors():
        from ..evaluation.ablations import baselines, fronts, joint, shift
        from ..evaluation.ablations.kinds import chats, kinds_of_text
        from ..evaluation.ablations.lab import Lab, OutOfTime, Recipe
        from ..evaluation.texts import python_topics
        from ..training import GateTraining
        from .record import made_with

        check_number("minutes", minutes, "a number of at least 0", lambda x: x >= 0)
        training = GateTraining(
            steps=steps, lam=0.16, window=64, length=train_length, batch_size=batch_size,
            checkpointing=checkpointing,
        )  # fmt: skip
        recipe = Recipe(training=training, length=length, contexts=contexts)
        prose = python_topics() if asked is None else "\n\n".join(read(asked))
        if quick:
            from ..evaluation.ablations.tiny import TINY, tiny_prose
            from ..evaluation.models import tiny_llama, tiny_tokenizer

            model, recipe, prose = "a tiny random Llama", TINY, tiny_prose()
            language_model: Any = tiny_llama()
            tokenizer: Any = tiny_tokenizer()
            trained_on = [prose[:4000]]
        elif texts is None:
            raise ValueError("texts: wanted texts to train on, which nothing asks about, got none")
        else:
            trained_on = read(texts)
            language_model, tokenizer = load(model, device, dtype)
        kinds = {"": prose}
        if what in (Ablation.shift, Ablation.adaptive_tau):
            kinds |= _own(kind) or ({"chat": chats(prose)} if quick else kinds_of_text(prose))
        texts_hash = hashlib.sha256("\n".join(trained_on).encode()).hexdigest()[:16]
        lab = Lab(
            model=language_model,
            tokenizer=tokenizer,
            texts=trained_on,
            asked=kinds,
            out=out,
            recipe=recipe,
            settings={
                "model": model,
                "dtype": str(language_model.dtype).removeprefix("torch."),
                "texts": texts_hash,
            },
            deadline=began + 60 * minutes,
            say=typer.echo,
        )
        runs = {
            Ablation.lam: fronts.by_lambda,
            Ablation.window: fronts.by_window,
            Ablation.width: fronts.by_width,
            Ablation.inputs: fronts.by_inputs,
            Ablation.baselines: baselines.by_baseline,
            Ablation.shift: shift.by_kind,
            Ablation.adaptive_tau: shift.by_request,
            Ablation.pareto: joint.by_pair,
        }
        try:
            charts = runs[what](lab)
        except OutOfTime:
            typer.echo("the time is over; the same command goes on")
            raise typer.Exit(1) from None
        import attrs

        device_name = made_with(language_model)["device"]
        said = (
            f"{model}, {lab.settings['dtype']}, {device_name}; gates of {recipe.training.steps} "
            f"steps of lambda {recipe.training.lam:g} unless said; {recipe.contexts} documents and "
            f"contexts of {recipe.length} tokens; errors over contexts."
        )
        for number, chart in enumerate(charts, 1):
            label = what.value if len(charts) == 1 else f"{what.value}-{number}"
            written = attrs.evolve(chart, notes=(*chart.notes, said)).write(out, label)
            typer.echo(", ".join(map(str, written)))


def _own(pairs: list[str] | None) -> dict[str, str]:
    found = {}
    for pair in pairs or ():
        name, _, path = pair.partition("=")
        if not name or not Path(path).exists():
            raise ValueError(f"kind: wanted NAME=FILE of a file that is there, got {pair!r}")
        found[name] = "\n\n".join(read(Path(path)))
    return found
