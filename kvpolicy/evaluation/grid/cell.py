"""Measuring one cell: what a composition answers, holds and reads on one task."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.hf import Attachment, KVPolicyCache, attach
from ...adapters.hf.capture import Stepper
from ...pipeline import CachePipeline
from ..sessions import look_back
from ..sessions.pipeline import settled
from ..sessions.score import AnswerScore
from ..tasks.loss import hit_tokens, losses
from ..tasks.prompts import Example, Ids, Question
from .records import Footprint, Measured
from .together import block, in_groups

_CAPTURE_FROM = 6  # steps from which a graph saves more than its capture costs


Ends = Callable[[KVPolicyCache, Sequence[Ids]], None]


class OutOfTime(Exception):
    """The time limit came before the cell was finished."""


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    pipeline: CachePipeline,
    examples: Sequence[Example],
    *,
    question_in_prompt: bool = True,
    captured: bool = True,
    page_size: int = 16,
    check: Callable[[], None] = lambda: None,
    tokenizer: Any = None,
) -> Measured:
    """Scores by context, and sizes after the first question; `check` may raise OutOfTime.

    As many contexts as fit are read together, each in a sequence of its own, and every question in
    a copy of its context's sequence. Answers are decoded token by token by the cache; with
    `captured`, by a CUDA graph where there is a device for it. Pages hold `page_size` tokens. The
    `tokenizer` is that of evictions that let the model repeat its context.
    """
    began = time.monotonic()
    scores: list[list[AnswerScore]] = []
    sizes: list[Footprint] = []
    read: list[float] = []
    with attach(model, pipeline, page_size=page_size) as attached:
        ends = partial(_end, attached, tokenizer)

        def ask(group: Sequence[Example]) -> tuple[list[list[AnswerScore]], Footprint, list[float]]:
            check()
            cache = attached.new_cache()
            _forward(model, cache, *block([example.context_ids for example in group]))
            densities = _densities(cache, len(group))
            if not question_in_prompt:
                ends(cache, [example.context_ids for example in group])
            late = ends if question_in_prompt else None
            asked = [example.questions for example in group]
            found = ask_together(model, cache, asked, late, captured=captured)
            return found, _size_after(model, cache, [x[0] for x in asked], late), densities

        longest = max(len(example.context_ids) for example in examples)
        for found, size, densities in in_groups(model, pipeline, examples, longest, ask):
            scores += found
            sizes += [size] * len(found)
            read += densities
    kinds: dict[str, Callable[[AnswerScore], float]] = {
        "accuracy": lambda answer: answer.token_accuracy,
        "exact": lambda answer: answer.exact_match,
        "log_likelihood": lambda answer: answer.log_likelihood,
    }
    return Measured(
        scores={n: tuple(statistics.fmean(map(of, x)) for x in scores) for n, of in kinds.items()}
        | ({"density": tuple(read)} if read else {}),
        questions=sum(map(len, scores)),
        footprint=_mean(sizes),
        seconds=time.monotonic() - began,
    )


@torch.no_grad()
def read_text(
    model: PreTrainedModel,
    pipeline: CachePipeline,
    documents: Sequence[Tensor],
    *,
    page_size: int = 16,
    check: Callable[[], None] = lambda: None,
) -> Measured:
    """Losses by document, over all tokens and over hit tokens; `check` may raise OutOfTime.

    Documents `[N]` are of one length; pages hold `page_size` tokens.
    """
    began = time.monotonic()
    everywhere, hits, read = [], [], []
    sizes: list[Footprint] = []
    with attach(model, pipeline, page_size=page_size) as attached:

        def losses_of(group: list[Tensor]) -> tuple[Tensor, Footprint, list[float]]:
            check()
            cache = attached.new_cache()
            texts = torch.stack(group).to(model.device)
            return (
                losses(partial(_run, model, cache), texts),
                _size(cache),
                _densities(cache, len(group)),
            )

        longest = max(map(len, documents))
        for found, size, densities in in_groups(model, pipeline, documents, longest, losses_of):
            everywhere += [row.mean().item() for row in found]
            rows = zip(documents[len(sizes) :], found, strict=False)
            chosen = [row[hit_tokens(document)[1:]] for document, row in rows]
            hits += [hit.mean().item() for hit in chosen if len(hit)]
            sizes += [size] * len(found)
            read += densities
    scores = {"loss": tuple(everywhere), "hit_loss": tuple(hits)}
    return Measured(
        scores=scores | ({"density": tuple(read)} if read else {}),
        footprint=_mean(sizes),
        seconds=time.monotonic() - began,
    )


def ask_together(
    model: PreTrainedModel,
    cache: KVPolicyCache,
    asked: Sequence[Sequence[Question]],
    ends: Ends | None,
    *,
    captured: bool = True,
) -> list[list[AnswerScore]]:
    """Asks each of the cache's sequences its own questions, all at once, in copies of them.

    Answers are decoded teacher-forced. `ends` ends the prompts behind the questions; None: they
    have ended.
    """
    questions = [question for one in asked for question in one]
    twins = cache.fork([row for row, one in enumerate(asked) for _ in one])
    texts = [question.question_ids for question in questions]
    logits = _forward(model, twins, *block(texts))
    if ends is not None:
        ends(twins, texts)
    found = iter(_decode(model, twins, logits, [q.answer_ids for q in questions], captured))
    return [[next(found) for _ in one] for one in asked]


def _end(attached: Attachment, tokenizer: Any, cache: KVPolicyCache, texts: Sequence[Ids]) -> None:
    """Ends prompts that end with such texts."""
    look_back.look_back(attached, cache, texts, tokenizer)
    cache.end_prompt()


def _decode(
    model: PreTrainedModel,
    cache: KVPolicyCache,
    logits: Tensor,
    answers: Sequence[Ids],
    captured: bool,
) -> list[AnswerScore]:
    """Scores of `answers`, one a sequence, from the `logits` `[B, V]` before their first tokens."""
    assert cache.state is not None
    device, steps = logits.device, max(map(len, answers))
    # One column more than is fed, so that sequences of any length end inside.
    ids = torch.tensor([[*row, *[0] * (steps - len(row))] for row in answers], device=device)
    left = torch.tensor([len(row) for row in answers], device=device)
    position = torch.tensor(cache.state.lengths, device=device)[:, None]
    stepper = Stepper(model, cache, position, steps)
    if stepper.captured and not (captured and steps > _CAPTURE_FROM):
        stepper.captured = False
    chosen, likely = [], []
    for at in range(steps):
        chosen.append(logits.argmax(-1))
        right = torch.log_softmax(logits.float(), -1).gather(1, ids[:, at, None])
        likely.append(right[:, 0])
        if at + 1 < steps:
            logits = stepper.step(ids[:, at], left > at + 1)[:, -1]
    picked, values = (torch.stack(rows, 1).tolist() for rows in (chosen, likely))
    return [
        AnswerScore(
            predicted_ids=tuple(picked[row][: len(wanted)]),
            answer_ids=wanted,
            log_likelihood=statistics.fmean(values[row][: len(wanted)]),
        )
        for row, wanted in enumerate(answers)
    ]


def _forward(model: PreTrainedModel, cache: KVPolicyCache, ids: Tensor, real: Tensor) -> Tensor:
    """Appends `ids` `[B, S]` that are `real`; logits `[B, vocabulary]` after the last column."""
    mask = None
    if not real.all():
        past = torch.ones(len(ids), cache.columns, dtype=torch.long)
        mask = torch.cat([past, real.long()], 1).to(model.device)
    return _run(model, cache, ids, mask, logits_to_keep=1)[:, -1]


def _run(
    model: PreTrainedModel,
    cache: KVPolicyCache,
    ids: Tensor,
    mask: Tensor | None = None,
    logits_to_keep: int = 0,
) -> Tensor:
    """Logits `[B, S, vocabulary]` of a forward, or of its last columns."""
    return model(
        input_ids=ids.to(model.device),
        attention_mask=mask,
        past_key_values=cache,
        logits_to_keep=logits_to_keep,
    ).logits


def _size_after(
    model: PreTrainedModel,
    cache: KVPolicyCache,
    questions: Sequence[Question],
    ends: Ends | None,
) -> Footprint:
    """What each sequence holds after a question and the answer's first token."""
    texts = [question.question_ids for question in questions]
    _forward(model, cache, *block(texts))
    if ends is not None:
        ends(cache, texts)
    _forward(model, cache, *block([question.answer_ids[:1] for question in questions]))
    return _size(cache)


def _densities(cache: KVPolicyCache, contexts: int) -> list[float]:
    """The part of the blocks that prompts of so many contexts read, mean over layers that chose."""
    found = [x for x in cache.report().prompt_read if x is not None]
    return [statistics.fmean(found)] * contexts if found else []


def _size(cache: KVPolicyCache) -> Footprint:
    """Mean tokens per head, window included, and bytes, of one of the cache's sequences."""
    assert cache.state is not None
    found = settled(cache)
    batch, spec = cache.state.batch, cache.spec
    heads = sum(len(layer) for layer in found.stored)
    token = 2 * spec.head_dim * spec.dtype.itemsize
    return Footprint(
        held_tokens=statistics.fmean(x for layer in found.stored for x in layer),
        seen_tokens=found.tokens / batch,
        read_tokens=found.mean_read,
        bytes=found.total / batch,
        kv_bytes=found.kv / batch,
        # Places for tokens: the window and pages, without the ring's places for rollback.
        slots=found.kv / batch / heads / token - spec.rollback,
        admitted=found.mean_admitted,
        evicted=sum(map(sum, found.evicted)) / batch,
    )


def _mean(sizes: Sequence[Footprint]) -> Footprint:
    names = [field.name for field in attrs.fields(Footprint)]
    return Footprint(**{n: statistics.fmean(getattr(size, n) for size in sizes) for n in names})
