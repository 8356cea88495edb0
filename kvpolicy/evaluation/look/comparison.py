"""Several cache policies on the same questions: accuracy, memory, reading and speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.hf import attach
from ...pipeline import CachePipeline
from ..sessions.pipeline import PipelineSession
from ..sessions.score import AnswerScore, PlainSession, Score, ask
from ..tasks.prompts import Example
from . import kept_map

Advance = Callable[[str, int], None]  # what is being done, and the work that it was
PREFILL_WORK = 5  # a prefill costs about this many questions


@attrs.frozen(kw_only=True)
class Composition:
    """A row of the comparison.

    Without a `pipeline` the row is transformers' own DynamicCache; `missing` says why a row cannot
    run.
    """

    name: str
    detail: str = ""
    pipeline: CachePipeline | None = None
    missing: str = ""

    def new_session(self, model: PreTrainedModel) -> PlainSession | PipelineSession:
        """An empty session; use it inside `attached(model)`."""
        return (
            PlainSession(model) if self.pipeline is None else PipelineSession(model, self.pipeline)
        )

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[object]:
        """The model with this row's pipeline on it."""
        return nullcontext() if self.pipeline is None else attach(model, self.pipeline)


@attrs.define(kw_only=True)
class Run:
    """What one composition did so far.

    `session` went through the first context and its first question and then generated `generated`;
    `rates` are tokens per second, one a round. `kept` `[L, Hkv, N]` tells which tokens of the first
    context each head held before any question.
    """

    composition: Composition
    answers: list[tuple[AnswerScore, ...]] = attrs.field(factory=list)
    session: PlainSession | PipelineSession | None = None
    logits: Tensor | None = None
    generated: list[int] = attrs.field(factory=list)
    rates: list[float] = attrs.field(factory=list)
    held_bytes: int = 0
    tokens_read: float = 0.0
    kept: Tensor | None = None

    @property
    def score(self) -> Score:
        return Score(answers=tuple(self.answers))

    @property
    def tokens_per_second(self) -> float:
        """The median round's."""
        return statistics.median(self.rates)


def compare(
    model: PreTrainedModel,
    compositions: Sequence[Composition],
    examples: Sequence[Example],
    *,
    rounds: int,
    round_tokens: int,
    advance: Advance = lambda doing, work: None,
    finished: Callable[[int, Run], None] = lambda context, run: None,
) -> list[Run]:
    """Asks every composition all questions, the question being the prompt's end.

    Each composition prefills each context itself and asks the questions in forks. On the first
    context, decoding is then timed in `rounds` of `round_tokens` greedy tokens in which the
    compositions take turns, so that a busy machine slows all of them alike.

    Args:
        advance: called with what is next and the work just done, see `work_of`.
        finished: called with the context's number and the run after each context.
    """
    runs = [Run(composition=c) for c in compositions if not c.missing]
    for number, example in enumerate(examples):
        for run in runs:
            _answer(model, run, example, number, len(examples), advance)
            finished(number, run)
        if number == 0:
            for at in range(rounds):
                for run in runs:
                    advance(f"decoding, round {at + 1} of {rounds}: {run.composition.name}", 1)
                    _generate(model, run, round_tokens)
            for run in runs:
                assert run.session is not None
                run.held_bytes, run.tokens_read = (
                    run.session.held_bytes(),
                    run.session.tokens_read(),
                )
                run.session = None
    return runs


def work_of(compositions: Sequence[Composition], examples: Sequence[Example], rounds: int) -> int:
    """All the work that `compare` tells `advance` about."""
    questions = sum(PREFILL_WORK + len(example.questions) for example in examples)
    return sum(questions + rounds for c in compositions if not c.missing)


def _answer(
    model: PreTrainedModel, run: Run, example: Example, number: int, contexts: int, advance: Advance
) -> None:
    """Asks one context's questions; keeps the session of the first context for the timing."""
    place = f"context {number + 1} of {contexts}: {run.composition.name}"
    with run.composition.attached(model):
        session = run.composition.new_session(model)
        advance(f"{place}, reading {len(example.context_ids)} tokens", 0)
        session.prefill(torch.tensor(example.context_ids))
        if number == 0 and isinstance(session, PipelineSession):
            run.kept = kept_map.kept(session.state)
        done, answers = PREFILL_WORK, []
        for at, question in enumerate(example.questions):
            advance(f"{place}, question {at + 1} of {len(example.questions)}", done)
            answers.append(ask(session.fork(), question))
            done = 1
        run.answers.append(tuple(answers))
        if number == 0:
            run.session = session
            run.logits = session.prefill(torch.tensor(example.questions[0].question_ids))
            session.end_prompt()
        advance(place, done)


@torch.no_grad()
def _generate(model: PreTrainedModel, run: Run, tokens: int) -> None:
    """Greedy tokens, one by one, and how fast they came."""
    session, logits = run.session, run.logits
    assert session is not None and logits is not None
    with run.composition.attached(model):
        began = time.perf_counter()
        for _ in range(tokens):
            run.generated.append(int(logits.argmax()))
            logits = session.step(torch.tensor(run.generated[-1:]))[-1]
        run.rates.append(tokens / (time.perf_counter() - began))
    run.logits = logits


def speed_ratio(run: Run, other: Run) -> float:
    """How much faster `run` decodes than `other`: the median over rounds."""
    return statistics.median(a / b for a, b in zip(run.rates, other.rates, strict=True))
