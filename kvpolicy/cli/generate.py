"""`kvpolicy generate` and `kvpolicy chat`: a model's answers through a pipeline's cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
    text_of,
)

if TYPE_CHECKING:
    from ..pipeline import CachePipeline
    from .talk import Talk

New = Annotated[int, typer.Option(min=1, max=MOST, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest token always.")]
TopP = Annotated[
    float,
    typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this total probability."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the draws.")]
System = Annotated[str | None, typer.Option(help="A system prompt.")]
ShowReport = Annotated[
    bool, typer.Option("--report/--no-report", help="What the cache holds, at the end, on stderr.")
]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--file", help="A text that comes before the prompt.", exists=True, dir_okay=False
    ),
]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help='What to ask; "-" reads it from stdin.')],
    file: Files = None,
    gate: Gate = None,
    duo: Duo = None,
    sparsity: Sparsity = 0.5,
    window: Window = None,
    quest: QuestTokens = None,
    snapkv: SnapKVTokens = None,
    pipeline: Own = None,
    trust_code: Trust = False,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    system: System = None,
    max_new_tokens: New = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: OfWeights = None,
    report: ShowReport = True,
) -> None:
    """Answer a prompt through a cache with policies, and say what the cache holds.

    Without a policy everything is kept. The answer goes to stdout as it comes.
    """
    with errors():
        composition = composed(window, gate, duo, sparsity, quest, snapkv, pipeline, trust_code)
        asked = sys.stdin.read() if prompt == "-" else prompt
        asked = "\n\n".join([*(text_of(path) for path in file or []), asked])
        options = (temperature, top_p, max_new_tokens)
        with _talk(model, composition, device, dtype, seed, options, raw, system) as talk:
            talk.say(asked)
            _tell(talk, report)


def chat(
    model: Model,
    file: Files = None,
    gate: Gate = None,
    duo: Duo = None,
    sparsity: Sparsity = 0.5,
    window: Window = None,
    quest: QuestTokens = None,
    snapkv: SnapKVTokens = None,
    pipeline: Own = None,
    trust_code: Trust = False,
    system: System = None,
    max_new_tokens: New = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: OfWeights = None,
    report: ShowReport = True,
) -> None:
    """Talk to a model; all turns share one cache, which the policies keep small.

    A line is a turn. Ctrl-D ends, and the report follows; so does Ctrl-C.
    """
    with errors():
        composition = composed(window, gate, duo, sparsity, quest, snapkv, pipeline, trust_code)
        before = [text_of(path) for path in file or []]
        options = (temperature, top_p, max_new_tokens)
        with _talk(model, composition, device, dtype, seed, options, False, system) as talk:
            if talk.raw:
                raise ValueError(
                    f"model: wanted a tokenizer with a chat template, {model!r} has none; "
                    "kvpolicy generate continues a text without one"
                )
            try:
                for turn in _turns():
                    talk.say("\n\n".join([*before, turn]))
                    before = []
            except KeyboardInterrupt:
                typer.echo()
            _tell(talk, report)


def _turns() -> Iterator[str]:
    """Lines of stdin, asked for on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            turn = input(prompt)
        except EOFError:
            return
        if turn.strip():
            yield turn


@contextmanager
def _talk(
    model: str,
    pipeline: CachePipeline | None,
    device: str | None,
    dtype: str | None,
    seed: int,
    options: tuple[float, float, int],
    raw: bool,
    system: str | None,
) -> Iterator[Talk]:
    """A conversation with a model that has `pipeline` attached, or keeps everything."""
    language_model, tokenizer = load(model, device, dtype)
    import torch

    from ..adapters.hf import attach
    from ..pipeline import CachePipeline
    from .talk import Talk, options_of

    torch.manual_seed(seed)
    with attach(language_model, pipeline or CachePipeline()) as attached:
        yield Talk(attached, tokenizer, options_of(*options), raw=raw, system=system)


def _tell(talk: Talk, shown: bool) -> None:
    """The report on stderr, so that the answer alone is on stdout."""
    if shown:
        typer.echo(f"\n{talk.report()}", err=True)
