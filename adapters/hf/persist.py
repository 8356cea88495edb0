"""Saving a cache to a file and going on from it, with the same model and pipeline."""

from __future__ import annotations

import os
from typing import Any, Unpack

import torch
from torch import nn

from ...errors import PhaseError
from ...pipeline import CachePipeline
from ...spec import Sizes
from ...store import persist
from .cache import KVPolicyCache, new_cache
from .models import model_fingerprint


def save_cache(cache: KVPolicyCache, path: str | os.PathLike[str]) -> None:
    """Writes `cache` to `path`; see `KVPolicyCache.save`."""
    model = cache.model()
    if cache.state is None or model is None:
        what = "its model is gone" if model is None else "nothing went through this cache yet"
        raise PhaseError(f"save: {what}")
    masks = [valid for _, valid in cache.chunks if valid is not None]
    extra = {
        "columns": torch.tensor([n for n, _ in cache.chunks]),
        "masked": torch.tensor([valid is not None for _, valid in cache.chunks]),
        "valid": torch.cat(masks, 1) if masks else torch.zeros(cache.state.batch, 0).bool(),
    }
    notes = {"phase": cache.phase, "counts_positions": str(cache.counts_positions)}
    persist.save(
        cache.state,
        path,
        cache.pipeline,
        fingerprint=model_fingerprint(model),
        extra=extra,
        notes=notes,
    )


def load_cache(
    model: nn.Module,
    pipeline: CachePipeline,
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    **sizes: Unpack[Sizes],
) -> KVPolicyCache:
    """The cache that `KVPolicyCache.save` wrote, on `model`'s device.

    `dtype` and `sizes` are those the saved cache was made with. What follows is what would have
    followed the saved cache, token for token. Raises ValueError, with the reason, for a file that
    is truncated or altered, or that another model, pipeline or size wrote; loading never runs code.
    """
    cache: Any = new_cache(model, pipeline, dtype=dtype, **sizes)
    cache.state, extra, notes = persist.load(
        path, pipeline, cache.spec, fingerprint=model_fingerprint(model)
    )
    columns = [int(n) for n in extra["columns"]]
    masked = extra["masked"].tolist()
    valid = iter(extra["valid"].split([n for n, m in zip(columns, masked, strict=True) if m], 1))
    cache.chunks = [(n, next(valid) if m else None) for n, m in zip(columns, masked, strict=True)]
    cache.phase = notes["phase"]
    cache.counts_positions = notes["counts_positions"] == "True"
    return cache
