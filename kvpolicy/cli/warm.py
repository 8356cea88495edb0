"""`kvpolicy warm`: kernels compiled before the first request, and kept on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .._fields import MOST
from .common import (
    Device,
    Duo,
    Gate,
    Model,
    OfWeights,
    Own,
    QuestTokens,
    SnapKVTokens,
    Sparsity,
    Trust,
    Window,
    composed,
    errors,
    load,
)
from .progress import Asked, Progress

if TYPE_CHECKING:
    from ..adapters.hf.warm import Warmed


def warm(
    model: Model,
    gate: Gate = None,
    duo: Duo = None,
    sparsity: Sparsity = 0.5,
    window: Window = None,
    quest: QuestTokens = None,
    snapkv: SnapKVTokens = None,
    pipeline: Own = None,
    trust_code: Trust = False,
    batch: Annotated[
        int, typer.Option(min=1, max=1 << 16, help="Sequences that decode together, at most.")
    ] = 16,
    length: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Tokens of the longest prompt; default: at most 8192."),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--compile", help="Layers too, as attach(..., compile=True) does.")
    ] = False,
    page_size: Annotated[int, typer.Option(min=1, max=MOST, help="Tokens of a page.")] = 16,
    device: Device = None,
    dtype: OfWeights = None,
    progress: Asked = None,
) -> None:
    """Compile the kernels that a model and a pipeline need, so that no request waits for it.

    They stay in the caches of Triton and Inductor on disk, by which other processes start. On a
    CPU only layers are compiled.
    """
    with errors():
        from ..adapters.hf import attach
        from ..pipeline import CachePipeline

        composition = composed(window, gate, duo, sparsity, quest, snapkv, pipeline, trust_code)
        language_model, _ = load(model, device, dtype)
        with (
            attach(
                language_model, composition or CachePipeline(), compile=layers, page_size=page_size
            ) as attached,
            Progress("request", asked=progress, lines=True) as shown,
        ):
            found = attached.warm(
                batch, length, lambda done, of, said: _doing(shown, done, of, said)
            )
        typer.echo(_told(found))


def _doing(shown: Progress, done: int, of: int, said: str) -> None:
    if not done:
        shown.begin(of)
    if of:
        shown.done(done, said)


def _told(found: Warmed) -> str:
    from ..backend import disk_cache

    where = f", on disk in {disk_cache()}" if found.kernels else " (there are none on a CPU)"
    lines = [f"{len(found.kernels)} kernels ready after {found.seconds:.1f} s{where}"]
    lines += [f"left out: {said}" for said in found.left_out]
    return "\n".join(lines)
