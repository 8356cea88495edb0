"""Contexts and questions: what reads a context into a cache, and what asks about it afterwards."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..._arguments import check_embeds, check_ids, check_mask, check_text, optional
from ..._fields import check_int
from ...errors import PhaseError, UnsupportedError
from .attached import Attached
from .cache import KVPolicyCache
from .generate import merged_config, run
from .masks import check_mask as check_numbers
from .own_steps import check_put_aside
from .tiles import cuts, refuse_more, refuse_whole
from .wrappers import soft_prompt

QUESTIONS = ("decode", "prompt")
OWN = {"inputs", "inputs_embeds", "past_key_values"}  # arguments of generate that `ask` gives


def read(
    attachment: Attached,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    cache: KVPolicyCache | None,
    chunk_size: int | None,
) -> KVPolicyCache:
    """See `Attachment.read`."""
    optional(check_ids, "input_ids", input_ids)
    optional(check_embeds, "inputs_embeds", inputs_embeds)
    optional(check_mask, "attention_mask", attention_mask)
    optional(check_int, "chunk_size", chunk_size, 1)
    if (input_ids is None) == (inputs_embeds is None):
        which = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: wanted exactly one, got {which}")
    name = "input_ids" if inputs_embeds is None else "inputs_embeds"
    inputs: Any = input_ids if inputs_embeds is None else inputs_embeds
    whole = inputs.shape[1]
    if attention_mask is not None and attention_mask.shape != inputs.shape[:2]:
        raise ValueError(
            f"attention_mask: wanted {list(inputs.shape[:2])}, of the new columns, got "
            f"{list(attention_mask.shape)}"
        )
    reader: Any = attachment.decoder
    if soft_prompt(attachment.model):
        if cache is not None or chunk_size is not None:
            raise UnsupportedError("read: a soft prompt goes before one forward of one context")
        reader = attachment.model
    cache = attachment.cache_for(cache, "cache")
    refuse_more(attachment, cache)
    held = [0] if cache.state is None else cache.state.lengths
    ends = cuts(attachment, held, attention_mask, whole, chunk_size)
    before, last = cache.columns, cache.columns + whole
    check_put_aside(attachment.base, attachment.put_aside, before, before + ends[0], last)
    if not cache.columns:
        cache.moved = [None for _ in attachment.forwards.moving]
    with torch.no_grad(), attachment.forwards.holding():
        cache.begin_prompt()
        for start, stop in pairwise([0, *ends]):
            part = slice(start, stop)
            mask = None if attention_mask is None else attention_mask[:, part]
            reader(
                **{name: inputs[:, part]},
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        cache.end_prompt()
    return cache


def ask(
    attachment: Attached,
    cache: KVPolicyCache,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    question: str,
    options: dict[str, Any],
) -> Any:
    """See `Attachment.ask`."""
    check_ids("input_ids", input_ids)
    optional(check_mask, "attention_mask", attention_mask)
    if taken := OWN.intersection(options):
        raise TypeError(f"{min(taken)}: ask gives it to generate itself; it is no option")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: wanted {list(input_ids.shape)}, of the question, got "
            f"{list(attention_mask.shape)}"
        )
    config = merged_config(attachment, options)
    rows = max(config.num_beams or 1, config.num_return_sequences or 1)
    fork = _fork(attachment, cache, input_ids, question, rows)
    mask = _full_mask(fork, input_ids, attention_mask, rows)
    given = {"input_ids": input_ids, "attention_mask": mask, "past_key_values": fork}
    if attachment.served.probe.first and "position_ids" not in options:
        # The context's tokens were counted from there.
        given["position_ids"] = _places(mask, input_ids.shape[1], attachment)
    if question == "decode" and one_by_one(attachment):
        given["prefill_chunk_size"] = 1
    return run(attachment, {**options, **given}, question)


def loglikelihood(
    attachment: Attached,
    input_ids: Tensor,
    continuation_ids: Tensor,
    attention_mask: Tensor | None,
    continuation_mask: Tensor | None,
    question: str,
) -> Tensor:
    """See `Attachment.loglikelihood`."""
    check_ids("input_ids", input_ids)
    check_ids("continuation_ids", continuation_ids)
    optional(check_mask, "attention_mask", attention_mask)
    optional(check_mask, "continuation_mask", continuation_mask)
    _check(question)
    refuse_whole(attachment, "loglikelihood")
    if input_ids.shape[1] < 2 or not continuation_ids.shape[1]:
        raise ValueError("input_ids: wanted two columns or more, and a continuation of one or more")
    if len(continuation_ids) != len(input_ids):
        raise ValueError(
            f"continuation_ids: wanted a row for each of input_ids, {len(input_ids)}, got "
            f"{len(continuation_ids)}"
        )
    check_numbers(continuation_mask, "continuation_mask")
    real = _right_padded(continuation_ids, continuation_mask)
    if attention_mask is not None and not bool(attention_mask[:, -1].all()):
        raise ValueError(
            "attention_mask: wanted contexts padded on the left, since a continuation follows "
            "their last column, got a mask that hides it"
        )
    mask = None if attention_mask is None else attention_mask[:, :-1]
    prompt, last = input_ids.shape[1] - 1, input_ids.shape[1] + continuation_ids.shape[1] - 1
    check_put_aside(attachment.base, attachment.put_aside, 0, prompt, last)
    cache = read(attachment, input_ids[:, :-1], mask, None, None, None)
    asked = torch.cat([input_ids[:, -1:], continuation_ids[:, :-1]], 1)
    decoded = question == "decode"
    width = 1 if decoded and one_by_one(attachment) else asked.shape[1]
    with torch.no_grad(), attachment.forwards.holding():
        cache.begin_question(None if decoded else cache.columns + asked.shape[1])
        logits = [
            attachment.base(
                input_ids=part,
                attention_mask=None if continuation_mask is None else shown,
                past_key_values=cache,
                return_dict=True,
            ).logits
            for part, shown in zip(asked.split(width, 1), real.split(width, 1), strict=True)
        ]
    attachment.used(cache)
    scores = torch.cat(logits, 1).float().log_softmax(-1)
    found = scores.gather(-1, continuation_ids[..., None].to(scores.device)).squeeze(-1)
    return found.masked_fill(~real.to(found.device), 0)


def _right_padded(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens of continuations `[B, N]` are real, bool."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    shown = mask.bool()
    if mask.shape != ids.shape:
        raise ValueError(f"continuation_mask: wanted {list(ids.shape)}, got {list(mask.shape)}")
    if bool((shown[:, 1:] & ~shown[:, :-1]).any()):
        raise ValueError("continuation_mask: wanted padding on the right, got it before a token")
    return shown


def one_by_one(attachment: Attached) -> bool:
    """Whether a question's tokens must be decoded one by one.

    Evictions fall between them; layers that share keys choose pages for one token; and some
    models go on from their states by one column.
    """
    pipeline, known = attachment.pipeline, attachment.served
    evicts = pipeline.eviction.when == "decode" and not pipeline.eviction.neutral
    chooses = bool(known.readers) and not pipeline.selection.neutral
    return evicts or chooses or not known.probe.goes_on


def _check(question: str) -> None:
    check_text("question", question, f"one of {', '.join(QUESTIONS)}")
    if question not in QUESTIONS:
        raise ValueError(f"question: wanted one of {', '.join(QUESTIONS)}, got {question!r}")


def _fork(
    attachment: Attached, cache: KVPolicyCache, input_ids: Tensor, question: str, rows: int
) -> KVPolicyCache:
    """A copy with a sequence for each that will be generated."""
    _check(question)
    if cache is None:
        raise TypeError("cache: wanted a KVPolicyCache that read a context, got None")
    cache = attachment.cache_for(cache, "cache")
    if cache.state is None or cache.phase != "decode":
        raise PhaseError(
            "ask: the cache's prompt has not ended; read the context by attached.read(context), or "
            "call cache.end_prompt()"
        )
    batch, held = input_ids.shape[0], cache.state.batch
    if held not in (1, batch):
        raise ValueError(
            f"input_ids: wanted 1 or {held} questions for {held} sequences, got {batch}"
        )
    of = range(batch) if held == batch else [0] * batch
    return cache.fork([row for row in of for _ in range(rows)])


def _places(mask: Tensor, columns: int, attachment: Attached) -> Tensor:
    """Position ids `[B, S]` of a question's columns, as a forward counts them."""
    first = attachment.served.probe.first
    assert first is not None
    return (mask.long().cumsum(1) - 1 + first).clamp(min=first)[:, -columns:]


def _full_mask(
    fork: KVPolicyCache, input_ids: Tensor, attention_mask: Tensor | None, rows: int
) -> Tensor:
    new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    before = fork.real()[::rows].to(new.device, new.dtype)
    return torch.cat([before, new], 1)
