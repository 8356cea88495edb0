"""Measuring one cell: what a composition answers, holds and reads on one task."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.hf import KVPolicyCache, attach, new_cache
from ..pipeline import CachePipeline
from ..store import CacheState, Report
from .long_text import hit_tokens, losses
from .prompts import Example, Question
from .score import AnswerScore, grade
from .session import PipelineSession

Row = dict[str, Any]


class OutOfTime(Exception):
    """The time limit came before the cell was finished."""


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    pipeline: CachePipeline,
    examples: Sequence[Example],
    *,
    question_in_prompt: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Row:
    """Scores by context, and sizes after the first question; `check` may raise OutOfTime.

    The questions of a context are asked together, each in a sequence of its own.
    """
    began, scores, sizes = time.monotonic(), [], []
    with attach(model, pipeline):
        for example in examples:
            check()
            cache = new_cache(model, pipeline)
            _forward(model, cache, torch.tensor([example.context_ids]))
            if not question_in_prompt:
                cache.end_prompt()
            scores.append(ask_together(model, cache, example.questions, question_in_prompt))
            sizes.append(_size_after(model, cache, example.questions[0], question_in_prompt))
    return {
        "accuracy": [statistics.fmean(a.token_accuracy for a in x) for x in scores],
        "exact": [statistics.fmean(a.exact_match for a in x) for x in scores],
        "log_likelihood": [statistics.fmean(a.log_likelihood for a in x) for x in scores],
        **_means(sizes),
        "seconds": time.monotonic() - began,
    }


def read_text(
    model: PreTrainedModel,
    pipeline: CachePipeline,
    documents: Sequence[Tensor],
    *,
    check: Callable[[], None] = lambda: None,
) -> Row:
    """Losses by document, over all tokens and over hit tokens; `check` may raise OutOfTime."""
    began, sizes = time.monotonic(), []
    everywhere, hits = [], []
    with attach(model, pipeline):
        for ids in documents:
            check()
            session = PipelineSession(model, pipeline)
            found = losses(session, ids)
            everywhere.append(found.mean().item())
            hit = found[hit_tokens(ids)[1:]]
            if len(hit):
                hits.append(hit.mean().item())
            sizes.append(_size(session.state, session.report))
    return {
        "loss": everywhere,
        "hit_loss": hits,
        **_means(sizes),
        "seconds": time.monotonic() - began,
    }


def ask_together(
    model: PreTrainedModel,
    cache: KVPolicyCache,
    questions: Sequence[Question],
    question_in_prompt: bool,
) -> list[AnswerScore]:
    """Asks all questions in a batch of copies of `cache`; answers are decoded teacher-forced."""
    twins = cache.fork([0] * len(questions))
    asked = [question.question_ids for question in questions]
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in asked])
    real = torch.tensor([[i >= width - len(row) for i in range(width)] for row in asked])
    rows = [_forward(model, twins, ids, real)]
    if question_in_prompt:
        twins.end_prompt()
    answers = [question.answer_ids for question in questions]
    for at in range(max(map(len, answers)) - 1):
        ids = torch.tensor([[row[min(at, len(row) - 1)]] for row in answers])
        rows.append(_forward(model, twins, ids, torch.tensor([[at < len(r) - 1] for r in answers])))
    return [grade([logits[i] for logits in rows[: len(row)]], row) for i, row in enumerate(answers)]


def _forward(
    model: PreTrainedModel, cache: KVPolicyCache, ids: Tensor, real: Tensor | None = None
) -> Tensor:
    """Appends `ids` `[B, S]` that are `real`; logits `[B, vocabulary]` after the last column."""
    mask = None
    if real is not None and not real.all():
        past = torch.ones(len(ids), cache.columns, dtype=torch.long)
        mask = torch.cat([past, real.long()], 1).to(model.device)
    out = model(
        input_ids=ids.to(model.device), attention_mask=mask, past_key_values=cache, logits_to_keep=1
    )
    return out.logits[:, -1]


def _size_after(
    model: PreTrainedModel, cache: KVPolicyCache, question: Question, question_in_prompt: bool
) -> Row:
    """What the cache of one sequence holds after a question and the answer's first token."""
    _forward(model, cache, torch.tensor([question.question_ids]))
    if question_in_prompt:
        cache.end_prompt()
    _forward(model, cache, torch.tensor([question.answer_ids[:1]]))
    assert cache.state is not None
    return _size(cache.state, cache.report)


def _size(state: CacheState, report: Callable[[], Report]) -> Row:
    """Mean tokens per head, window included, and all bytes, of one sequence's cache."""
    for pool in state.pools.values():
        pool.trim()
    found = report()
    return {
        "held_tokens": statistics.fmean(x for layer in found.stored for x in layer),
        "seen_tokens": found.tokens,
        "read_tokens": found.mean_read,
        "bytes": found.total,
    }


def _means(sizes: Sequence[Row]) -> Row:
    return {name: statistics.fmean(size[name] for size in sizes) for name in sizes[0]}
