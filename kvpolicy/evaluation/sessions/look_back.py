"""The passes that evictions want which look back at a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...adapters.hf import Attachment, KVPolicyCache, repeats
from ...eviction import Eviction, JudgeQ
from ..tasks.prompts import Ids


def alone(eviction: Eviction) -> bool:
    """Whether contexts must be read one at a time: each is repeated in its own parts."""
    return eviction.replayed and not isinstance(eviction, JudgeQ)


def look_back(
    attached: Attachment,
    cache: KVPolicyCache,
    contexts: Sequence[Ids],
    tokenizer: Any,
    suffix: str = "\n",
) -> None:
    """Judge Q's tokens behind prompts that have not ended, or the model's repetition of a context.

    `suffix` ends a user's turn in the model's chat template. Does nothing for other evictions.
    """
    eviction, model = attached.pipeline.eviction, attached.model
    if isinstance(eviction, JudgeQ):
        embeds = eviction.embeds_for(len(contexts)).to(model.device, model.dtype)
        attached.replay(cache, inputs_embeds=embeds, sinks=0)
    elif eviction.replayed:
        ids = torch.tensor([contexts[0]], device=model.device)
        for again, span in repeats(tokenizer, ids, suffix=suffix):
            attached.replay(cache, again, span=span)
