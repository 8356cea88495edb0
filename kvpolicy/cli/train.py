"""`kvpolicy train-gate` and `train-duo`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .._extras import extra
from .common import Device, Model, OfWeights, errors, load, read
from .progress import AskedLines, StepProgress


class Objective(StrEnum):
    """Objectives of pattern training."""

    duo = "duo"
    wgkv = "wgkv"


class KeyInputs(StrEnum):
    """Keys that a gate reads."""

    both = "both"
    pre = "pre"
    post = "post"


class Mix(StrEnum):
    """Kinds of training sequences."""

    default = "default"
    recall = "recall"


class Kernel(StrEnum):
    """Attention kernels of the student."""

    auto = "auto"
    dense = "dense"
    flex = "flex"
    flash = "flash"


Texts = Annotated[Path | None, typer.Option(help="A .txt file or a folder of them.", exists=True)]
Dataset = Annotated[
    str | None, typer.Option(help="A data set of the hub instead of texts; it is streamed.")
]
Subset = Annotated[str | None, typer.Option(help="The data set's configuration.")]
Split = Annotated[str, typer.Option(help="The data set's split.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a training sequence.")]
Seed = Annotated[int, typer.Option(help="Of data and initialisation.")]
RunDir = Annotated[
    Path | None, typer.Option(help="Metrics and state; a run resumes from it.", file_okay=False)
]
Shard = Annotated[
    bool, typer.Option("--shard", help="Split the frozen weights over a launcher's processes.")
]
SaveEvery = Annotated[int, typer.Option(min=0, help="Steps between saves of the state.")]


def train_gate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The gate's file: .safetensors or .pt.")],
    texts: Texts = None,
    dataset: Dataset = None,
    subset: Subset = None,
    split: Split = "train",
    steps: Steps = 1500,
    window: Annotated[int, typer.Option(min=1, help="Local window in tokens.")] = 64,
    target_keep: Annotated[
        float | None, typer.Option(help="Fraction of tokens in the cache, window included.")
    ] = None,
    lam: Annotated[float | None, typer.Option(help="A fixed weight of the regulariser.")] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Tokens of a training sequence; several take turns. [4096]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step, of the longest.")] = 2,
    threshold: Annotated[float, typer.Option(help="Admits above it.")] = 0.1,
    expand: Annotated[float, typer.Option(help="Hidden units per channel.")] = 4.0,
    inputs: Annotated[
        KeyInputs, typer.Option(help="Keys that it reads: before RoPE (pre), after (post), both.")
    ] = KeyInputs.both,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    start: Annotated[
        Path | None,
        typer.Option(help="A gate's file to continue from.", exists=True, dir_okay=False),
    ] = None,
    start_lam: Annotated[float, typer.Option(help="First weight when steered.")] = 0.16,
    ungated: Annotated[int, typer.Option(min=0, help="Random open positions a step.")] = 0,
    answer_share: Annotated[
        float, typer.Option(help="Part of the loss where answers are predicted.")
    ] = 0.0,
    mix: Annotated[
        Mix, typer.Option(help="Sequences; recall: more people in places, whole tables.")
    ] = Mix.default,
    kernel: Annotated[Kernel, typer.Option(help="Of the student's attention.")] = Kernel.auto,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = True,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between hard evaluations.")] = 0,
    seed: Seed = 0,
    device: Device = None,
    dtype: OfWeights = None,
    shard: Shard = False,
    run_dir: RunDir = None,
    save_every: SaveEvery = 100,
    progress: AskedLines = None,
) -> None:
    """Train write gates for a frozen model by distillation.

    Give --target-keep or --lam, and --texts or --dataset.
    """
    with errors():
        from ..training import GateTraining, WriteGates, train_write_gate

        if out.suffix not in (".safetensors", ".pt"):
            raise ValueError(f"out: wanted a name ending in .safetensors or .pt, got {str(out)!r}")
        settings = GateTraining(
            steps=steps,
            window=window,
            target_keep=target_keep,
            lam=lam,
            length=length or 4096,
            batch_size=batch_size,
            threshold=threshold,
            expand=expand,
            inputs=inputs.value,
            mix=mix.value,
            lr=lr,
            seed=seed,
            start_lam=start_lam,
            ungated=ungated,
            answer_share=answer_share,
            kernel=kernel.value,
            checkpointing=checkpointing,
            eval_every=eval_every,
        )
        found = _documents(texts, dataset, subset, split)
        language_model, tokenizer = load(model, device, dtype, shard=shard)
        before = None if start is None else WriteGates.load(start, language_model)
        with StepProgress(steps, asked=progress, shown=_is_main()) as shown:
            trained = train_write_gate(
                language_model,
                found,
                settings,
                tokenizer=tokenizer,
                start=before,
                out_dir=run_dir,
                save_every=save_every,
                progress=shown.step,
            )
        if _is_main():
            out.parent.mkdir(parents=True, exist_ok=True)
            trained.save(out)
            typer.echo(f"{out}: lambda {trained.lam:.4g}, {trained.keep:.1%} kept, window {window}")
        _leave()


def train_duo(
    model: Model,
    out: Annotated[Path, typer.Option(help="The pattern's folder.", file_okay=False)],
    texts: Texts = None,
    dataset: Dataset = None,
    subset: Subset = None,
    split: Split = "train",
    steps: Steps = 2000,
    objective: Annotated[Objective, typer.Option(help="Whose loss.")] = Objective.duo,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens streaming heads keep.")] = 128,
    window: Annotated[int, typer.Option(min=1, help="Last tokens streaming heads keep.")] = 256,
    lam: Annotated[float | None, typer.Option(help="Weight of the regulariser.")] = None,
    length: Length = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = True,
    seed: Seed = 0,
    device: Device = None,
    dtype: OfWeights = None,
    shard: Shard = False,
    run_dir: RunDir = None,
    save_every: SaveEvery = 100,
    progress: AskedLines = None,
) -> None:
    """Train a DuoAttention pattern: which KV heads need the whole context."""
    with errors():
        from ..training import train_duo_attention

        found = _documents(texts, dataset, subset, split)
        language_model, tokenizer = load(model, device, dtype, shard=shard)
        with StepProgress(steps, asked=progress, shown=_is_main()) as shown:
            trained = train_duo_attention(
                language_model,
                found,
                tokenizer=tokenizer,
                steps=steps,
                objective=objective.value,
                sink_size=sinks,
                recent_size=window,
                lam=lam,
                length=length,
                batch_size=batch_size,
                seed=seed,
                checkpointing=checkpointing,
                out_dir=run_dir,
                save_every=save_every,
                progress=shown.step,
            )
        if _is_main():
            trained.save(out)
            typer.echo(f"{out}: mean head weight {trained.heads.mean():.3f}")
        _leave()


def _documents(
    texts: Path | None, dataset: str | None, subset: str | None, split: str
) -> Iterable[Any]:
    if (texts is None) == (dataset is None):
        raise ValueError("texts, dataset: wanted exactly one; add --texts FOLDER")
    if texts is not None:
        return read(texts)
    with extra("train"):
        import datasets

    found: Iterable[Any] = datasets.load_dataset(dataset, subset, split=split, streaming=True)
    return found


def _is_main() -> bool:
    """Whether this process writes files, under a launcher of several."""
    return os.environ.get("RANK", "0") == "0"


def _leave() -> None:
    """Leaves the launcher's group: one that the end of the process breaks off may abort it."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
