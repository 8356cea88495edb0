"""What generate does with a tokenizer, which transformers gives to its own loops only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteriaList, StopStringCriteria

from ...errors import UnsupportedError
from .attached import Attached
from .cache import KVPolicyCache
from .wrappers import unwrapped


def use_tokenizer(kwargs: dict[str, Any], config: Any) -> None:
    """Turns `stop_strings` into a stopping criterion.

    `kwargs` are the call's and are changed, `config` is what they merge to.
    """
    tokenizer = kwargs.pop("tokenizer", None)
    kwargs.pop("assistant_tokenizer", None)
    if config.stop_strings is None:  # an empty one stops at once
        return
    _check(tokenizer, "stop_strings")
    stop = StopStringCriteria(tokenizer=tokenizer, stop_strings=config.stop_strings)
    given = kwargs.get("stopping_criteria") or []
    kwargs["stopping_criteria"] = StoppingCriteriaList([*given, stop])
    kwargs["stop_strings"] = None


def heal(attachment: Attached, kwargs: dict[str, Any], config: Any, seen: int) -> None:
    """Heals the prompt's last tokens, for all loops: its columns may be others afterwards.

    Raises UnsupportedError where transformers would go on with the columns of before, since the
    cache has `seen` some or the prompt is cut into chunks.
    """
    if not config.token_healing:
        return
    tokenizer = kwargs.get("tokenizer")
    _check(tokenizer, "token_healing")
    kwargs["token_healing"] = False
    name = next((name for name in ("inputs", "input_ids") if kwargs.get(name) is not None), None)
    if name is None:  # embeddings, or one BOS token
        return
    ids = kwargs[name]
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _mask_of(ids, config)
    base, before = attachment.base, ids.shape[1]
    healed = type(base).heal_tokens(_Healed(attachment), ids, tokenizer)
    after = healed.shape[1]
    if after != before and (seen or config.prefill_chunk_size is not None):
        raise UnsupportedError(
            f"token_healing: it makes {after} columns of {before}, which is not served with a "
            "filled cache or prefill_chunk_size; strip the text before it is tokenized"
        )
    kwargs[name] = healed
    if after != before and bool(kwargs["attention_mask"].all()):
        kwargs["attention_mask"] = torch.ones_like(healed)


def _check(tokenizer: Any, name: str) -> None:
    if tokenizer is None:
        raise ValueError(f"tokenizer: {name} needs the model's tokenizer, got None")


def use_mask(cache: KVPolicyCache, kwargs: dict[str, Any], config: Any) -> None:
    """Goes on with what earlier masks of `cache` hid, where the call gives none of its own.

    A padding token that the cache holds is a token, such as one that the model chose itself.
    """
    given = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]
    whole = next((x for x in given if x is not None), None)
    if whole is None or kwargs.get("attention_mask") is not None:
        return
    hidden = cache.real()
    if whole.ndim == 2:
        mask = _mask_of(whole, config)
    else:
        mask = torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device)
    if bool(hidden.all()) and (not hidden.shape[1] or bool(mask.all())):
        return
    rows, width = hidden.shape
    if mask.shape[1] > width and rows % mask.shape[0] == 0:
        mask[:, :width] = hidden[:: rows // mask.shape[0]]
        kwargs["attention_mask"] = mask


def inferred_mask(kwargs: dict[str, Any], config: Any) -> Tensor | None:
    """The mask `[B, S]` that transformers infers where a call gives ids and no mask."""
    given = [kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs")]
    whole = next((x for x in given if x is not None), None)
    if whole is None or whole.ndim != 2 or kwargs.get("attention_mask") is not None:
        return None
    return _mask_of(whole, config) if whole.numel() else None


class _Healed:
    """What heal_tokens sees: transformers' model, and the generate of the one that was attached."""

    def __init__(self, attachment: Attached) -> None:
        self.attachment = attachment

    def generate(self, input_ids: Tensor, **options: Any) -> Any:
        return unwrapped(self.attachment.model).generate(input_ids=input_ids, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attachment.base, name)


def _mask_of(ids: Tensor, config: Any) -> Tensor:
    """The mask that transformers infers, from ids whose padding healing has not touched."""
    pad, ends = config.pad_token_id, config.eos_token_id
    ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    if pad is None or pad in ends:
        return torch.ones_like(ids)
    mask: Tensor = (ids != pad).long()
    return mask
