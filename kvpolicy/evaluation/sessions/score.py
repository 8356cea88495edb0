"""Score answers, teacher-forced, through any cache that can be forked.

The exact match of a teacher-forced answer is the exact match of greedy decoding.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, Self

import attrs
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..tasks.prompts import Example, Question
from .estimates import Estimate, estimate


class Session(Protocol):
    """One sequence's cache and the model that reads it."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Append prompt tokens `[T]`; logits `[vocabulary]` after the last of them."""

    def end_prompt(self) -> None:
        """The prompt is complete: what a policy does at its end happens now."""

    def step(self, ids: Tensor) -> Tensor:
        """Append generated tokens `[T]`; logits `[T, vocabulary]`."""

    def fork(self) -> Self:
        """A copy that goes on by itself."""


class PlainSession:
    """Full attention with transformers' `DynamicCache`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)

    def prefill(self, ids: Tensor) -> Tensor:
        return self._run(ids, logits_to_keep=1)[-1]

    def end_prompt(self) -> None:
        pass

    def step(self, ids: Tensor) -> Tensor:
        return self._run(ids, logits_to_keep=0)

    def fork(self) -> PlainSession:
        twin = PlainSession(self._model)
        twin._cache = copy.deepcopy(self._cache)
        return twin

    def held_bytes(self) -> int:
        """Bytes of the cached keys and values."""
        layers: list[Any] = self._cache.layers
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def tokens_read(self) -> float:
        """Tokens per head that the last decoded token read: all."""
        return float(self._cache.get_seq_length())

    @torch.no_grad()
    def _run(self, ids: Tensor, logits_to_keep: int) -> Tensor:
        ids = ids.to(self._model.device)[None]
        out = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=logits_to_keep)
        return out.logits[0]


@attrs.frozen(kw_only=True)
class AnswerScore:
    """How one answer went; `predicted_ids[i]` is the choice after the true first `i` tokens."""

    predicted_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    log_likelihood: float

    @property
    def token_accuracy(self) -> float:
        """Part of the tokens that were right."""
        pairs = zip(self.predicted_ids, self.answer_ids, strict=True)
        return statistics.fmean(a == b for a, b in pairs)

    @property
    def exact_match(self) -> bool:
        """Whether every token was right."""
        return self.predicted_ids == self.answer_ids


@attrs.frozen(kw_only=True)
class Score:
    """Scores of all answers, `answers[context][question]`."""

    answers: tuple[tuple[AnswerScore, ...], ...]

    @property
    def token_accuracy(self) -> Estimate:
        """Part of the answers' tokens that were right."""
        return self._estimate(lambda answer: answer.token_accuracy)

    @property
    def exact_match(self) -> Estimate:
        """Part of the answers that were right from end to end."""
        return self._estimate(lambda answer: answer.exact_match)

    @property
    def log_likelihood(self) -> Estimate:
        """Mean over answers of the mean log-likelihood of a token, in nats."""
        return self._estimate(lambda answer: answer.log_likelihood)

    def _estimate(self, value: Callable[[AnswerScore], float]) -> Estimate:
        return estimate([statistics.fmean(map(value, context)) for context in self.answers])


def score(
    new_session: Callable[[], Session],
    examples: Iterable[Example],
    *,
    question_in_prompt: bool = True,
) -> Score:
    """Prefill each context once, then ask every question in a fork.

    Args:
        new_session: makes an empty session, e.g. `lambda: PlainSession(model)`.
        examples: what to ask.
        question_in_prompt: whether the prompt ends after the question, so that what happens at
            its end may know the question. If not, the prompt is the context alone and the
            question comes as decoded tokens. Never compare numbers of the two kinds.

    Returns:
        Scores of all answers.
    """
    return Score(
        answers=tuple(
            score_example(new_session(), example, question_in_prompt=question_in_prompt)
            for example in examples
        )
    )


@torch.no_grad()
def score_example(
    session: Session, example: Example, *, question_in_prompt: bool = True
) -> tuple[AnswerScore, ...]:
    """Scores of one example's answers, from an empty session."""
    session.prefill(torch.tensor(example.context_ids))
    if not question_in_prompt:
        session.end_prompt()
    return tuple(
        ask(session.fork(), question, question_in_prompt=question_in_prompt)
        for question in example.questions
    )


@torch.no_grad()
def ask(session: Session, question: Question, *, question_in_prompt: bool = True) -> AnswerScore:
    """Asks one question in a session that holds its context, and goes on with it."""
    asked = torch.tensor(question.question_ids)
    if question_in_prompt:
        logits = session.prefill(asked)
        session.end_prompt()
    else:
        logits = session.step(asked)[-1]
    rows = [logits]
    for token in question.answer_ids[:-1]:
        rows.append(session.step(torch.tensor([token]))[-1])
    return grade(rows, question.answer_ids)


def grade(rows: Sequence[Tensor], answer_ids: tuple[int, ...]) -> AnswerScore:
    """The score of an answer from the logits `[vocabulary]` before each of its tokens."""
    logits = torch.stack(list(rows)).float().cpu()
    right = torch.log_softmax(logits, -1).gather(1, torch.tensor(answer_ids)[:, None])
    return AnswerScore(
        predicted_ids=tuple(logits.argmax(-1).tolist()),
        answer_ids=answer_ids,
        log_likelihood=right.mean().item(),
    )
