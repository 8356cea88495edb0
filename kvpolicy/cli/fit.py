"""`kvpolicy fit-q-filters`, `fit-triattention` and `fit-kvzap`: methods that need no training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import Device, Model, OfWeights, errors, load, read

Out = Annotated[Path, typer.Option(help="The method's file: .safetensors.")]
Texts = Annotated[Path, typer.Option(help="A .txt file or a folder of them.", exists=True)]
Length = Annotated[int, typer.Option(min=2, help="Tokens of a text.")]
Documents = Annotated[int, typer.Option(min=1, help="Texts of so many tokens to read.")]
Seed = Annotated[int, typer.Option(help="Of where texts begin.")]


def fit_q_filters(
    model: Model,
    out: Out,
    texts: Texts,
    length: Length = 2048,
    documents: Documents = 16,
    seed: Seed = 0,
    device: Device = None,
    dtype: OfWeights = None,
) -> None:
    """Fit the filters of Q-Filters: one pass over some texts, no training."""
    with errors():
        from .. import QFilters, Tokens
        from ..training import fit_q_filters as fit

        language_model, _, ids = _fitted_on(
            model, out, texts, length, documents, seed, device, dtype
        )
        filters = fit(language_model, ids)
        QFilters(budget=Tokens(1), filters=filters).save(out)
        typer.echo(f"{out}: {list(filters.shape)} of {documents} texts of {length} tokens")


def fit_triattention(
    model: Model,
    out: Out,
    texts: Texts,
    length: Length = 2048,
    documents: Documents = 16,
    seed: Seed = 0,
    device: Device = None,
    dtype: OfWeights = None,
) -> None:
    """Fit the statistics of TriAttention: one pass over some texts, no training."""
    with errors():
        from .. import Tokens, TriAttention
        from ..training import fit_triattention as fit

        language_model, _, ids = _fitted_on(
            model, out, texts, length, documents, seed, device, dtype
        )
        real, imaginary, size = fit(language_model, ids)
        found = TriAttention(budget=Tokens(1), real=real, imaginary=imaginary, size=size)
        found.save(out)
        typer.echo(f"{out}: {list(size.shape)} of {documents} texts of {length} tokens")


def fit_kvzap(
    model: Model,
    out: Out,
    texts: Texts,
    length: Length = 2048,
    documents: Documents = 16,
    seed: Seed = 0,
    device: Device = None,
    dtype: OfWeights = None,
) -> None:
    """Fit KVzap's linear form: texts are read and repeated, and their scores fitted by a line."""
    with errors():
        from .. import KVzap
        from ..training import fit_kvzap as fit

        language_model, tokenizer, ids = _fitted_on(
            model, out, texts, length, documents, seed, device, dtype
        )
        w2, b2 = fit(language_model, tokenizer, ids)
        KVzap(w2=w2, b2=b2).save(out)
        typer.echo(f"{out}: {list(w2.shape)} of {documents} texts of {length} tokens")


def _fitted_on(
    model: str,
    out: Path,
    texts: Path,
    length: int,
    documents: int,
    seed: int,
    device: str | None,
    dtype: str | None,
) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and the texts that a file is fitted on; makes its folder."""
    from ..evaluation.tasks import loss

    if out.suffix != ".safetensors":
        raise ValueError(f"out: wanted a name ending in .safetensors, got {str(out)!r}")
    language_model, tokenizer = load(model, device, dtype)
    text = "\n\n".join(read(texts))
    ids = loss.documents(tokenizer, text, length=length, contexts=documents, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    return language_model, tokenizer, ids
