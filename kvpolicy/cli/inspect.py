"""`kvpolicy inspect`: what a composition keeps of a text, and what that changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._extras import extra
from .._fields import MOST
from .._files import write_text
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
    Texts,
    Trust,
    Window,
    composed,
    errors,
    load,
    read,
)

if TYPE_CHECKING:
    from ..evaluation.look.fidelity import Fidelity


def inspect(
    model: Model,
    texts: Texts,
    out: Annotated[Path, typer.Option(help="Folder of the report and the pages.")],
    gate: Gate = None,
    duo: Duo = None,
    sparsity: Sparsity = 0.5,
    window: Window = None,
    quest: QuestTokens = None,
    snapkv: SnapKVTokens = None,
    pipeline: Own = None,
    trust_code: Trust = False,
    length: Annotated[
        int, typer.Option(min=2, max=MOST, help="Tokens of the text that are read.")
    ] = 1024,
    continuation: Annotated[
        int, typer.Option(min=1, help="The last of them, decoded one by one.")
    ] = 64,
    device: Device = None,
    dtype: OfWeights = None,
) -> None:
    """Compare a composition with full attention on one text, and show what it kept.

    Writes fidelity.json, kept.html and kept.png.
    """
    with errors():
        with extra("plots"):  # before minutes of work whose last picture needs it
            import matplotlib  # noqa: F401
        from ..evaluation.look.fidelity import compare
        from ..evaluation.look.kept import kept_map
        from ..evaluation.tasks.prompts import encode

        composition = composed(window, gate, duo, sparsity, quest, snapkv, pipeline, trust_code)
        if composition is None:
            raise ValueError("gate, duo, window, quest, snapkv, pipeline: wanted at least one")
        language_model, tokenizer = load(model, device, dtype)
        ids = encode(tokenizer, "\n\n".join(read(texts)))[:length]
        found = compare(language_model, composition, ids, continuation=continuation)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "fidelity.json", json.dumps(_record(found), indent=1))
        kept = kept_map(_prompt(language_model, composition, ids), tokenizer, ids)
        kept.html(out / "kept.html")
        kept.png(out / "kept.png", tokenizer)
        typer.echo(
            f"{len(ids)} tokens: KL {found.mean_kl:.4f} nats, {found.agreement:.1%} of decoded "
            f"tokens agree, {kept.fraction:.1%} kept, attention lost {found.lost_mass.mean():.1%}"
        )
        for effect in found.effects:
            typer.echo(f"{effect.slot} {effect.policy}: {effect.detail}")
        typer.echo(f"{out}: fidelity.json, kept.html, kept.png")


def _prompt(model: Any, pipeline: Any, ids: Any) -> Any:
    """A session that has read `ids` to the end of the prompt."""
    import torch

    from ..adapters.hf import attach
    from ..evaluation.sessions.pipeline import PipelineSession

    with attach(model, pipeline):
        session = PipelineSession(model, pipeline)
        session.prefill(torch.tensor(ids))
        session.end_prompt()
        return session


def _record(found: Fidelity) -> dict[str, Any]:
    import attrs

    plain = attrs.asdict(found, filter=lambda field, _: field.name != "lost_mass")
    return plain | {
        "mean_kl": found.mean_kl,
        "agreement": found.agreement,
        "lost_mass": found.lost_mass.tolist(),
    }
