"""Arguments about columns that transformers' loops hand on whole where they cut the ids."""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin
from transformers.generation import GenerationConfig, GenerationMode

from ...errors import UnsupportedError
from .packed import BOUNDS

# Whether transformers drops masks of ones before its loops, as newer versions do.
_DROPS = "_mask_length" in GenerationMixin._prefill.__code__.co_consts


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
    if not _DROPS or (mask is not None and not bool(mask.all())):
        raise UnsupportedError(
            "attention_mask: beside inputs_embeds assisted generation cuts it to the ids generated "
            "so far; give one row without padding, which newer versions of transformers serve"
        )
