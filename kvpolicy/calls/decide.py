"""What policies decide about new tokens: admission and mark, as bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..admission import Write
from ..ops import ADMITTED, MARKED
from ..store.layer import LayerStore


def alike(layer: LayerStore) -> int | None:
    """The bits of every generated token, where no policy looks at it; else None."""
    if layer.slides:
        return 0
    return ADMITTED if layer.admission.neutral and layer.eviction.neutral else None


def decide(layer: LayerStore, write: Write) -> tuple[Tensor | None, int]:
    """Flags of generated tokens: the bit of admission, uint8 `[Hkv, T]`, and bits that all get.

    The tensor is None where nothing is decided. Generated tokens are not the prompt's and always
    keep the eviction's mark; whether they outlive the window, the eviction may decide as well.
    """
    flags, bits = _admitted(layer, write)
    if bits & MARKED and (stays := layer.eviction.admit(write)) is not None:
        both = _decision(layer.eviction, stays, write)
        flags, bits = both if flags is None else flags & both, bits & ~ADMITTED
    return flags, bits


def decide_prompt(layer: LayerStore, write: Write, shared: dict[Any, Any]) -> Tensor:
    """Flags uint8 `[Hkv, T]` of a prompt's tokens, which an eviction may leave without its mark.

    Where nothing is decided, layers of a call have one tensor, in `shared`.
    """
    flags, bits = _admitted(layer, write)
    if bits & MARKED and (mark := layer.eviction.mark(write)) is not None:
        marks = _decision(layer.eviction, mark, write) * MARKED
        flags, bits = marks if flags is None else flags | marks, bits & ~MARKED
    if flags is None:
        alike = "flags", write.key.shape[:2], bits, write.key.device
        if alike not in shared:
            shared[alike] = torch.full(alike[1], bits, dtype=torch.uint8, device=alike[3])
        found: Tensor = shared[alike]
        return found
    return flags | bits if bits else flags


def number(layer: LayerStore, write: Write) -> Tensor | None:
    """The numbers `[Hkv, T]` of new tokens, None where the eviction gives none."""
    if layer.numbers is None or not layer.eviction.numbered:
        return None
    found, shape = layer.eviction.number(write), write.key.shape[:2]
    if found is None:
        return None
    if not isinstance(found, Tensor) or not found.dtype.is_floating_point or found.shape != shape:
        got = type(found).__name__
        if isinstance(found, Tensor):
            got = f"{found.dtype} {list(found.shape)}"
        raise ValueError(
            f"{type(layer.eviction).__name__}.number: wanted floats {list(shape)}, got {got}"
        )
    return found


def _admitted(layer: LayerStore, write: Write) -> tuple[Tensor | None, int]:
    """The admission's bit where it decides, and the bits of every token otherwise."""
    if layer.slides:
        return None, 0
    bits = 0 if layer.eviction.neutral else MARKED
    if layer.admission.neutral:
        return None, ADMITTED | bits
    return _decision(layer.admission, layer.admission.admit(write), write), bits


def _decision(policy: object, decision: Tensor, write: Write) -> Tensor:
    """A policy's decisions `[Hkv, T]` as uint8, seen and not copied."""
    shape = write.key.shape[:2]
    if not isinstance(decision, Tensor) or decision.dtype != torch.bool or decision.shape != shape:
        got = (
            f"{decision.dtype} {list(decision.shape)}"
            if isinstance(decision, Tensor)
            else type(decision).__name__
        )
        raise ValueError(
            f"{type(policy).__name__}: wanted a bool tensor {list(shape)} of decisions, got {got}"
        )
    return decision.view(torch.uint8)
