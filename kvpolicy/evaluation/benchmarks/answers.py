"""Free greedy answers of a composition, several questions about one context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...adapters.hf import Attachment, attach
from ...pipeline import CachePipeline
from ...store import Report
from ..sessions.pipeline import settled
from ..tasks.prompts import Ids
from .chat import Chat, Prompt
from .item import Item


@attrs.frozen(kw_only=True)
class Answered:
    """What came of the questions about one context.

    `texts` are the answers, `tokens` those of the context, `dropped` of which did not fit into the
    model's positions and were left out. `bytes` is all that the cache held once the prompt had
    ended, `dense` what full attention's keys and values take; `held` the part of the tokens kept,
    window included. `footprint` is the KV footprint: entries stored times the steps that they stay,
    as a part of full attention's (arXiv 2506.17121). `first_token` are seconds from the start of
    the context to the first token of an answer.
    """

    texts: tuple[str, ...]
    tokens: int
    dropped: int
    bytes: float
    dense: float
    held: float
    footprint: float
    first_token: float


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pipeline: CachePipeline,
    items: Sequence[Item],
    *,
    seen: bool = False,
    page_size: int = 16,
    most: int | None = None,
) -> Answered:
    """Asks a model about the one context of all items; answers are greedy.

    With the questions unseen the context is read once, and each question is asked on a copy. `seen`
    puts a question into the prompt and reads it for each, so that what decides at a prompt's end
    knows it. `most` are the positions that the model has.
    """
    chat = Chat(tokenizer, most)
    prompts = [chat.prompt(item) for item in items]
    with attach(model, pipeline, page_size=page_size) as here, torch.no_grad():
        if seen:
            pairs = zip(prompts, items, strict=True)
            parts = [_in_prompt(here, tokenizer, prompt, item) for prompt, item in pairs]
        else:
            # The question that leaves least room says what all of them read.
            context = min((prompt.context for prompt in prompts), key=len)
            parts = [_on_copies(here, tokenizer, context, prompts, items)]
    sizes = ("bytes", "dense", "held", "footprint", "first_token")
    return Answered(
        texts=tuple(text for part in parts for text in part.texts),
        tokens=max(part.tokens for part in parts),
        dropped=max(prompt.dropped for prompt in prompts),
        **{name: statistics.fmean(getattr(part, name) for part in parts) for name in sizes},
    )


def _on_copies(
    here: Attachment,
    tokenizer: PreTrainedTokenizerBase,
    context: Ids,
    prompts: Sequence[Prompt],
    items: Sequence[Item],
) -> Answered:
    began = time.monotonic()
    cache = here.read(_row(here, context))
    _new(here.ask(cache, _row(here, prompts[0].question), **_greedy(tokenizer, 1)), 0)
    first = time.monotonic() - began
    report = settled(cache)
    ids, mask = _block([prompt.question for prompt in prompts])
    on = here.model.device
    replies = here.ask(
        cache, ids.to(on), mask.to(on), **_greedy(tokenizer, max(x.new_tokens for x in items))
    )
    new = [
        _new(row, ids.shape[1])[: item.new_tokens] for row, item in zip(replies, items, strict=True)
    ]
    asked = [
        len(prompt.question) + len(_until_end(tokenizer, row))
        for prompt, row in zip(prompts, new, strict=True)
    ]
    return _answered(tokenizer, new, report, len(context), statistics.fmean(asked), first)


def _in_prompt(
    here: Attachment, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, item: Item
) -> Answered:
    ids = _row(here, prompt.context + prompt.question)
    began = time.monotonic()
    here.model.generate(ids, **_greedy(tokenizer, 1))
    first = time.monotonic() - began
    report = here.last_report()
    replies = here.model.generate(ids, **_greedy(tokenizer, item.new_tokens))
    new = [_new(replies[0], ids.shape[1])]
    return _answered(
        tokenizer, new, report, ids.shape[1], len(_until_end(tokenizer, new[0])), first
    )


def _answered(
    tokenizer: PreTrainedTokenizerBase,
    new: Sequence[list[int]],
    report: Report,
    tokens: int,
    asked: float,
    first: float,
) -> Answered:
    heads = [x for layer in report.stored for x in layer]
    stored = statistics.fmean(heads)
    gone = statistics.fmean(x for layer in report.evicted for x in layer)
    # While the context is read the cache grows to its peak; afterwards what is asked joins it.
    spent = tokens / 2 * (stored + gone) + asked * (stored + asked / 2)
    return Answered(
        texts=tuple(
            tokenizer.decode(_until_end(tokenizer, row), skip_special_tokens=True) for row in new
        ),
        tokens=tokens,
        dropped=0,
        bytes=report.total,
        dense=report.dense,
        held=stored / tokens,
        footprint=spent / (tokens**2 / 2 + asked * (tokens + asked / 2)),
        first_token=first,
    )


def _greedy(tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> dict[str, Any]:
    pad = tokenizer.pad_token_id
    return {
        "do_sample": False,
        "max_new_tokens": new_tokens,
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
    }


def _until_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Generated ids up to the first one that ends a reply."""
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def _new(row: Tensor, begin: int) -> list[int]:
    found: list[int] = row.flatten().tolist()[begin:]
    return found


def _row(here: Attachment, ids: Ids) -> Tensor:
    return torch.tensor([ids], device=here.model.device)


def _block(rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    """Ids `[B, S]` padded on the left, and which are real, as an attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
    mask = torch.tensor([[int(i >= width - len(row)) for i in range(width)] for row in rows])
    return ids, mask
