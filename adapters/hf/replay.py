"""Tokens that look back at a context before it is compressed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._arguments import check_ids, check_mask, check_text, optional
from ..._fields import check_int, shown
from ...errors import PhaseError
from .attached import Attached
from .cache import KVPolicyCache

FIRST = "\n\nRepeat the previous context exactly."
NEXT = "\n\nRepeat the part of the previous context exactly, starting with"


class Repeat(NamedTuple):
    """A pass of a replay: `ids` `[1, n]` that look back at positions `span` of the context."""

    ids: Tensor
    span: range


def replay(
    attachment: Attached,
    cache: KVPolicyCache,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    span: range | None,
    sinks: int,
) -> None:
    """See `Attachment.replay`."""
    given = _given(input_ids, inputs_embeds)
    optional(check_mask, "attention_mask", attention_mask)
    if cache is None:
        raise TypeError("cache: wanted a KVPolicyCache that read a context, got None")
    cache = attachment.cache_for(cache, "cache")
    if cache.state is None or cache.phase != "prompt":
        raise PhaseError(
            "replay: wanted a cache whose prompt has not ended: run the context by model(ids, "
            "past_key_values=cache), replay, then call cache.end_prompt()"
        )
    before = cache.real()
    (tokens,) = given.values()
    ones = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    real = ones if attention_mask is None else attention_mask
    mask = torch.cat([before.to(real.device, real.dtype), real], 1)
    with (
        torch.no_grad(),
        attachment.forwards.holding(),
        cache.pipeline.replay(cache.state, span=span, sinks=sinks) as state,
    ):
        fork = cache.around(state, range(state.batch))
        attachment.decoder(**given, attention_mask=mask, past_key_values=fork, use_cache=True)


def _given(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> dict[str, Tensor]:
    """The one of both that is given, as the model takes it."""
    if (input_ids is None) == (inputs_embeds is None):
        got = "none" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: wanted one of them, got {got}")
    if input_ids is not None:
        check_ids("input_ids", input_ids)
        return {"input_ids": input_ids}
    if not isinstance(inputs_embeds, Tensor) or inputs_embeds.ndim != 3:
        raise ValueError(f"inputs_embeds: wanted [B, S, hidden], got {shown(inputs_embeds)}")
    return {"inputs_embeds": inputs_embeds}


def repeats(
    tokenizer: Any,
    input_ids: Tensor,
    *,
    chunk_size: int = 2048,
    prefix: int = 0,
    suffix: str = "\n",
    previous: int = 8,
) -> list[Repeat]:
    """KVzip's passes over a context `[1, S]`: parts of it, each with the request to repeat it.

    The request of a later part names the last `previous` tokens before it. The first `prefix`
    tokens, such as a system prompt, are not repeated. `suffix` is what ends a user's turn in the
    model's chat template and opens the answer (snu-mllab/KVzip; kvpress, presses/kvzip_press.py).

    Args:
        tokenizer: gives the ids of the requests, by `encode`.
        input_ids: the context's tokens, as they were read.
        chunk_size: tokens of a part.
        prefix: first tokens that are not repeated.
        suffix: a text that follows each request.
        previous: tokens before a part that its request names.

    Raises:
        ValueError, TypeError: for arguments out of their range, by their names.

    Example:
        `for ids, span in repeats(tokenizer, context): attached.replay(cache, ids, span=span)`
    """
    check_ids("input_ids", input_ids)
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: wanted one context [1, S], got {list(input_ids.shape)}")
    check_int("chunk_size", chunk_size, 1)
    check_int("prefix", prefix, 0, input_ids.shape[1] - 1)
    check_int("previous", previous, 0)
    check_text("suffix", suffix, "a text")
    if isinstance(tokenizer, str) or not callable(getattr(tokenizer, "encode", None)):
        raise TypeError(f"tokenizer: wanted one that has encode(text), got {shown(tokenizer)}")

    def ids(text: str) -> Tensor:
        found = tokenizer.encode(text, add_special_tokens=False)
        return torch.tensor([found], dtype=input_ids.dtype, device=input_ids.device)

    found = []
    for start in range(prefix, input_ids.shape[1], chunk_size):
        stop = min(start + chunk_size, input_ids.shape[1])
        asked = [ids(FIRST)] if start == prefix else [ids(NEXT)]
        if start > prefix and previous:
            asked.append(input_ids[:, max(start - previous, prefix) : start])
        parts = [*asked, ids(suffix), input_ids[:, start:stop]]
        found.append(Repeat(torch.cat([x.long() for x in parts], 1), range(start, stop)))
    return found
