"""Prompts in parts, and selections that act while prefilling: parts end between tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...selection import PerPhase, Selection
from .attached import Attached
from .cache import KVPolicyCache


def deciding(selection: Selection) -> str:
    """The name of what decides for prompts in a selection."""
    members = getattr(selection, "members", (selection,))
    policy = next(x for x in members if x.tile is not None)
    return type(policy.prefill if isinstance(policy, PerPhase) else policy).__name__


def refuse_whole(attachment: Attached, what: str) -> None:
    """Raises UnsupportedError if a prompt's last queries decide what all of it reads."""
    selection = attachment.pipeline.selection
    if selection.whole_prompt:
        raise UnsupportedError(
            f"{what}: {deciding(selection)} decides by a prompt's last queries what all of it "
            "reads, so that it takes whole prompts in one call, and scores of their tokens would "
            "depend on later ones"
        )


def refuse_more(attachment: Attached, cache: KVPolicyCache) -> None:
    """Raises UnsupportedError for a further prompt, if one decides whole prompts."""
    if cache.columns:
        refuse_whole(attachment, f"past_key_values, which holds {cache.columns} columns")


def cuts(
    attachment: Attached, lengths: list[int], mask: Tensor | None, columns: int, size: int | None
) -> list[int]:
    """Where a prompt of `columns` is cut into parts of up to `size`, its end included.

    A selection that acts while prefilling gets parts that end between its tiles, in each of the
    rows, which hold `lengths` tokens and bring those that `mask` `[B, columns]` shows. Raises
    UnsupportedError if it decides whole prompts, and where no cut suits all rows.
    """
    if size is None or size >= columns:
        return [columns]
    selection = attachment.pipeline.selection
    refuse_whole(attachment, "chunk_size")
    if selection.tile is None:
        return [*range(size, columns, size), columns]
    tile = selection.tile
    real = torch.ones(len(lengths), columns) if mask is None else mask.cpu()
    before = real.long().cumsum(1)[:, :-1]
    start = torch.tensor(lengths)[:, None]
    # A row that has not begun or has ended has no tile to split.
    fits = ((start + before) % tile == 0) | (before == 0) | (before == real.long().sum(1)[:, None])
    places = (fits.all(0).nonzero()[:, 0] + 1).tolist()
    found, at, most = [], 0, max(size, tile)
    while columns - at > most:
        inside = [c for c in places if at < c <= at + most]
        if not inside:
            raise UnsupportedError(
                f"chunk_size: {deciding(selection)} decides for {tile} positions at a time, and no "
                f"{most} columns from {at} on end between these in every row; pad rows to "
                f"multiples of {tile}, or read them in one call"
            )
        at = inside[-1]
        found.append(at)
    return [*found, columns]


def whole_chunks(attachment: Attached, config: Any, kwargs: dict[str, Any]) -> None:
    """Makes `generate` cut a prompt between tiles: its `prefill_chunk_size` in whole ones.

    Raises UnsupportedError where that is not possible.
    """
    selection, size = attachment.pipeline.selection, config.prefill_chunk_size
    if size is None or selection.tile is None:
        return
    refuse_whole(attachment, "prefill_chunk_size")
    if getattr(kwargs.get("past_key_values"), "columns", 0):
        raise UnsupportedError(
            f"prefill_chunk_size: {deciding(selection)} decides for {selection.tile} positions at "
            "a time, which chunks after tokens that the cache holds may split; read them by "
            "attached.read(ids, cache=cache, chunk_size=...)"
        )
    mask = kwargs.get("attention_mask")
    padded = (mask == 0).sum(1) if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if padded is not None and bool((padded % selection.tile != 0).any()):
        raise UnsupportedError(
            f"prefill_chunk_size: {deciding(selection)} decides for {selection.tile} positions at "
            "a time, and padding puts these at different columns; pad rows to multiples of "
            f"{selection.tile}, or generate without chunks"
        )
    kwargs["prefill_chunk_size"] = max(size // selection.tile, 1) * selection.tile
