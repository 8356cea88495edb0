"""Several texts in one row, as collators without padding make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError

# What such collators pass on beside position ids; all of it tells the same split.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def split(
    kwargs: dict[str, Any],
    batch: int,
    columns: int,
    cached: bool,
    apart: frozenset[int],
    gaps: bool = False,
) -> list[int] | None:
    """Lengths of the texts that rows `[batch, columns]` pack, in order; None if none packs several.

    As in transformers, position ids that do not go on by one begin a text, without a mask and a
    cache, in models that tell texts `apart` by them (see `Probe`); other bounds must say the same.
    Raises UnsupportedError if there is a cache, which cannot tell the texts apart, and for bounds
    alone, which only some of transformers' attention functions read. Beside a cache position ids
    that go on after a gap are one text to transformers, other than where masks are made before the
    cache is: `gaps`.
    """
    named = [name for name in BOUNDS if kwargs.get(name) is not None]
    places = _counting(kwargs.get("position_ids"), columns, apart)
    if places is None or kwargs.get("attention_mask") is not None or columns == 1:
        if named:
            raise UnsupportedError(
                f"{named[0]}: bounds of packed texts are served in forwards of several columns "
                "without attention_mask and cache, beside position_ids that restart, of models "
                "whose masks tell texts apart by these"
            )
        return None
    lengths = _of_positions(places, batch, columns)
    for name in named:
        other = _of_bounds(name, kwargs[name], columns)
        if other not in (None, lengths):
            raise ValueError(f"{name}: wanted the texts of position_ids, {lengths}, got {other}")
    for name in ("max_length_q", "max_length_k"):
        if name in named and int(kwargs[name]) != max(lengths):
            raise ValueError(f"{name}: wanted {max(lengths)}, got {int(kwargs[name])}")
    if len(lengths) == batch:
        return None
    if cached and (named or gaps or _restarts(places)):
        raise UnsupportedError(
            f"position_ids: {len(lengths)} texts in {batch} rows go through one cache, where they "
            "would see each other; pass use_cache=False to have each text served for itself"
        )
    return None if cached else lengths


def _counting(places: Any, columns: int, apart: frozenset[int]) -> Tensor | None:
    """The position ids `[1 or B, S]` by which a model tells texts apart; None if it does not."""
    if not isinstance(places, Tensor) or places.ndim not in apart or places.shape[-1] != columns:
        return None
    if places.ndim == 2:
        return places
    return places[0] if len(places) == 4 else None  # before those of the axes of images


def _of_positions(places: Tensor, batch: int, columns: int) -> list[int]:
    return _lengths((places.diff(dim=-1) != 1).expand(batch, -1), columns)


def _of_bounds(name: str, value: Any, columns: int) -> list[int] | None:
    if name.startswith("cu_seq_lens"):
        return [int(n) for n in value.diff().tolist()]
    return _lengths(value.diff(dim=-1) != 0, columns) if name == "seq_idx" else None


def _lengths(breaks: Tensor, columns: int) -> list[int]:
    """From `[B, columns - 1]`, whether a text begins in a column after the first."""
    starts = torch.ones(breaks.shape[0], columns, dtype=torch.bool, device=breaks.device)
    starts[:, 1:] = breaks
    at = [*starts.flatten().nonzero().squeeze(1).tolist(), starts.numel()]
    return [b - a for a, b in zip(at, at[1:], strict=False)]


def _restarts(places: Tensor) -> bool:
    return bool((places.diff(dim=-1) < 0).any())
