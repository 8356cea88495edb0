"""Going on from a cache in a file, with the same model and pipeline."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from ..._arguments import check_path
from ...pipeline import CachePipeline
from ...spec import Sizes
from ...store import persist
from .cache import KVPolicyCache, new_cache
from .columns import from_tensors
from .fingerprints import model_fingerprint
from .placement import device_at
from .rank_files import own_file
from .wrappers import decoder_of


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
    Where ranks share the model, every one calls and reads its own heads; UnsupportedError where
    another number of ranks wrote them.
    """
    check_path("path", path)
    cache = new_cache(model, pipeline, dtype=dtype, **sizes)
    with cache.ranks.together():
        state, extra, notes = persist.load(
            own_file(Path(path), cache.ranks), pipeline, cache.spec,
            fingerprint=model_fingerprint(model), exchange=cache.ranks.exchange,
        )  # fmt: skip
        cache.take_state(state)
        cache.chunks = from_tensors(extra)
        there = functools.partial(device_at, decoder_of(model), otherwise=cache.spec.device)
        cache.states.from_tensors(extra, state.batch, there)
        cache.phase = notes["phase"]
    return cache
