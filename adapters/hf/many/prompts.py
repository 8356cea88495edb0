"""Calls of packed prompt tokens: parts of several prompts in one row, each for its lane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .room import Room

Part = tuple[int, list[int], int, bool]  # lane, ids, position of the first, whether it ends


def read(model: Any, room: Room, parts: Sequence[Part]) -> Tensor:
    """Reads parts of prompts in one forward; logits `[N, V]` after those that end.

    In the order of `parts`. Raises CapacityError, and whatever a policy raises, with nothing
    changed.
    """
    cache, device = room.reading, room.state.spec.device
    order = sorted(range(len(parts)), key=lambda n: parts[n][0])
    ids: list[int] = []
    places: list[int] = []
    lengths = [0] * room.lanes
    last: dict[int, int] = {}
    for n in order:
        lane, tokens, first, ends = parts[n]
        ids += tokens
        places += range(first, first + len(tokens))
        lengths[lane] = len(tokens)
        if ends:
            last[n] = len(ids) - 1
    wanted = [last[n] for n in sorted(last)] or [len(ids) - 1]
    # Where layers lie on several devices, a list of numbers goes to the one that looks.
    keep: Any = wanted if room.state.spec.devices else _sent(wanted, device)
    cache.packed = lengths if room.lanes > 1 else None
    try:
        logits = model(
            input_ids=_sent(ids, device)[None],
            position_ids=_sent(places, device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            return_dict=True,
        ).logits[0]
    finally:
        cache.packed = None
    if len(logits) != len(wanted):  # a model that gives all of them
        logits = logits[keep]
    found: Tensor = logits[: len(last)].to(device)
    return found


def _sent(values: list[int], device: torch.device) -> Tensor:
    """Numbers on the device; the host does not wait for what runs there."""
    found = torch.tensor(values)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
