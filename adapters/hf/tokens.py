"""What generate does with a tokenizer, for our loop: transformers gives it to its own only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList, StopStringCriteria


def use_tokenizer(model: Any, kwargs: dict[str, Any], config: Any) -> None:
    """Turns `stop_strings` into a stopping criterion and heals the prompt's last tokens.

    `kwargs` are the call's and are changed, `config` is what they merge to.
    """
    tokenizer = kwargs.pop("tokenizer", None)
    kwargs.pop("assistant_tokenizer", None)
    for name in ("stop_strings", "token_healing"):
        if getattr(config, name) and tokenizer is None:
            raise ValueError(f"tokenizer: {name} needs the model's tokenizer, got None")
    if config.stop_strings:
        stop = StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings)
        given = kwargs.get("stopping_criteria") or []
        kwargs["stopping_criteria"] = StoppingCriteriaList([*given, stop])
        kwargs["stop_strings"] = None
    if config.token_healing:
        name = "inputs" if kwargs.get("inputs") is not None else "input_ids"
        ids = kwargs[name]
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = _mask_of(ids, config)
        kwargs[name] = healed = model.heal_tokens(ids, tokenizer)
        if healed.shape != ids.shape and bool(kwargs["attention_mask"].all()):
            kwargs["attention_mask"] = torch.ones_like(healed)
        kwargs["token_healing"] = False


def _mask_of(ids: Tensor, config: Any) -> Tensor:
    """The mask that transformers infers, from ids whose padding healing has not touched."""
    pad, ends = config.pad_token_id, config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    mask: Tensor = (ids != pad).long()
    return mask
