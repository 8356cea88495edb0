"""Our decoding loop, handed to generate as its decoding method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from .cache import KVPolicyCache


def decode_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    kvp_streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy or sampled decoding of `input_ids` `[B, S]`.

    transformers has validated and prepared everything; sequences that have ended store nothing more.
    """
    cache: KVPolicyCache = model_kwargs["past_key_values"]
    wanted = generation_config.return_dict_in_generate
    scores: list[Tensor] | None = [] if wanted and generation_config.output_scores else None
    raw: list[Tensor] | None = [] if wanted and generation_config.output_logits else None
    logits = model._prefill(input_ids, generation_config, model_kwargs).logits
    position = _next_position(model_kwargs, input_ids)
    stepper = Stepper(model, cache, position)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    pad = generation_config._pad_token_tensor
    while True:
        last = logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        processed = logits_processor(input_ids, last)
        if scores is not None:
            scores.append(processed)
        if raw is not None:
            raw.append(last)
        token = _choose(processed, generation_config.do_sample)
        if pad is not None:
            token = torch.where(unfinished, token, pad.to(token.device))
        input_ids = torch.cat([input_ids, token[:, None]], -1)
        if kvp_streamer is not None:
            kvp_streamer.put(token.cpu())
        alive = unfinished & ~stopping_criteria(input_ids, scores)
        if not bool(alive.any()):
            break
        logits = stepper.step(token, unfinished)
        unfinished = alive
    stepper.finish()
    if kvp_streamer is not None:
        kvp_streamer.end()
    if not wanted:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=None if scores is None else tuple(scores),
        logits=None if raw is None else tuple(raw),
        past_key_values=cache,
    )


def _choose(scores: Tensor, sample: bool) -> Tensor:
    if not sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1)


def _next_position(model_kwargs: dict[str, Any], input_ids: Tensor) -> Tensor:
    """Position ids `[B, 1]` of the first generated token."""
    mask = model_kwargs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return torch.full_like(input_ids[:, :1], input_ids.shape[1])
    return mask.long().sum(1, keepdim=True)


class Stepper:
    """Runs one decoded token after another."""

    def __init__(self, model: Any, cache: KVPolicyCache, position: Tensor) -> None:
        self.model, self.cache, self.position = model, cache, position

    def step(self, token: Tensor, unfinished: Tensor) -> Tensor:
        """Logits `[B, 1, V]` after feeding `token` `[B]`; ended rows feed padding and store nothing."""
        state = self.cache.state
        assert state is not None
        active = unfinished.tolist()
        if active != state.active:
            state.finish([row for row, on in enumerate(active) if not on])
        out = self.model(
            input_ids=token[:, None],
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.position = self.position + 1
        return out.logits

    def finish(self) -> None:
        """Called once when decoding has ended."""
