"""The sizes of a model's cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Unpack

import attrs
import torch
from torch import nn

from ..._arguments import check_dtype, optional
from ...errors import UnsupportedError
from ...spec import CacheSpec, LayerSizes, Sizes, check_sizes
from .models import Served, served, shards


def spec_of(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **sizes: Unpack[Sizes],
) -> CacheSpec:
    """The cache sizes of `model`; under tensor parallelism those of this rank's heads.

    `dtype` and `device` replace those of the attention layers: the widest dtype of their keys and
    values, the device of each. `sizes` passes `page_size`, `rollback` and `interval` on.
    Raises TypeError for a word that names no size, UnsupportedError for a model not served.
    """
    check_sizes(sizes)
    return spec_from(served(model), dtype=dtype, device=device, **sizes)


def spec_from(
    known: Served,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    **sizes: Unpack[Sizes],
) -> CacheSpec:
    """`spec_of` of a model that is known; `sizes` are checked."""
    optional(check_dtype, "dtype", dtype)
    layers = known.layers
    if known.sharded:
        raise UnsupportedError(
            "model: fully_shard splits each weight over ranks and gathers it for every forward; "
            "train gates on it, and run a cache on the whole model or with tp_plan='auto'"
        )
    widest = functools.reduce(torch.promote_types, [layer.dtype for layer in layers])
    each = tuple(
        LayerSizes(
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            value_dim=layer.value_dim,
            scale=layer.scale,
            softcap=layer.softcap,
            window=layer.window,
            chunk=layer.chunk,
            shared=layer.shared,
        )
        for layer in layers
    )
    first = next((x for x in each if x.window is None), each[0])
    part, parts = shards(layers[0].module)
    uniform = CacheSpec(
        layers=len(layers),
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        dtype=widest if dtype is None else dtype,
        device=layers[0].device if device is None else device,
        devices=_devices(known) if device is None else (),
        scale=first.scale,
        sliding=_windows(each),
        head_offset=part * first.kv_heads,
        all_kv_heads=parts * first.kv_heads,
        hidden=_hidden(known),
        **sizes,
    )
    if all(uniform.at(index) == own for index, own in enumerate(each)):
        return uniform
    return attrs.evolve(uniform, sliding=(), per_layer=each)


def _hidden(known: Served) -> int | None:
    """Channels of the attention input, None where layers that policies manage differ in them."""
    found = {layer.hidden for layer in known.layers if layer.window is None}
    return found.pop() if len(found) == 1 and min(found) else None


def _devices(known: Served) -> tuple[torch.device, ...]:
    """Of each layer, where they are several."""
    found = tuple(layer.device for layer in known.layers)
    return found if len(set(found)) > 1 else ()


def _windows(each: Sequence[LayerSizes]) -> tuple[int | None, ...]:
    windows = tuple(x.window for x in each)
    return windows if any(w is not None for w in windows) else ()
