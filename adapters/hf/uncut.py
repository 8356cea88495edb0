"""Arguments about columns that transformers' loops hand on whole where they cut the ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationConfig, GenerationMode

from ...errors import UnsupportedError
from .packed import BOUNDS

# Whether transformers drops masks of ones before its loops, as newer versions do.
DROPS_ONES = "_mask_length" in GenerationMixin._prefill.__code__.co_consts


def check_uncut(
    config: GenerationConfig, mode: GenerationMode, kwargs: dict[str, Any], *, soft: bool
) -> None:
    """Raises UnsupportedError for them, and for chunks beside a `soft` prompt."""
    for name in BOUNDS:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{name}: generate goes on from one text a row")
    chunks = config.prefill_chunk_size is not None
    if chunks and soft:
        raise UnsupportedError(
            "prefill_chunk_size: not with a soft prompt, which PEFT puts before each chunk anew"
        )
    if kwargs.get("inputs_embeds") is None:
        return
    if chunks:
        raise UnsupportedError(
            "prefill_chunk_size: not beside inputs_embeds, of which transformers' chunks are not "
            "cut; use attached.read(inputs_embeds=..., chunk_size=...)"
        )
    if mode != GenerationMode.ASSISTED_GENERATION:
        return
    mask = kwargs.get("attention_mask")
    ids = [kwargs.get(name) for name in ("inputs", "input_ids")]
    if any(x is not None and x.numel() for x in ids):
        raise UnsupportedError(
            "inputs_embeds: not beside the ids of assisted generation, whose first candidates have "
            "no embeddings"
        )
    if not DROPS_ONES or (mask is not None and not bool(mask.all())):
        raise UnsupportedError(
            "attention_mask: beside inputs_embeds assisted generation cuts it to the ids generated "
            "so far; give one row without padding, which newer versions of transformers serve"
        )


def check_routed(config: Any, kwargs: dict[str, Any], mask: Tensor | None) -> None:
    """Raises UnsupportedError for router logits of candidates beside a `mask` that hides some.

    The loss that comes with them wants a mask of a whole forward; the first one is run as two.
    """
    asked = kwargs.get("output_router_logits")
    if asked is None:
        asked = getattr(config, "output_router_logits", False)
    if asked and mask is not None and not bool(mask.all()):
        raise UnsupportedError(
            "output_router_logits: not in assisted generation beside a mask that hides columns, "
            "which their loss would have to match; leave it out, or pass a row without padding"
        )


def shorten_mask(kwargs: dict[str, Any], width: int, columns: int) -> None:
    """Leaves of a mask what is about new ids: assisted decoding cuts it to as many columns.

    What it says of columns before was compared with what the cache holds. Raises UnsupportedError
    where new ids are hidden.
    """
    mask = kwargs.get("attention_mask")
    if mask is None or bool(mask.all()):
        return
    if not DROPS_ONES or not bool(mask[:, columns - width : columns].all()):
        raise UnsupportedError(
            "attention_mask: it hides columns, and assisted decoding of new ids alone cuts it to "
            "as many columns as there are ids, in transformers too; newer versions serve it where "
            "no new id is hidden"
        )
    kwargs["attention_mask"] = torch.ones_like(mask[:, :width])
