"""The sizes of a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypedDict, get_args

import attrs
import torch

from ._arguments import check_dtype
from ._fields import (
    MOST_INT,
    check_int,
    integer,
    not_negative,
    one_of,
    optional,
    positive,
    shown,
)
from ._names import instead, named
from .choices import AtCap
from .layer_sizes import LayerSizes as LayerSizes
from .layer_sizes import a_factor, check_groups

# Device, KV heads, channels of keys and of values.
Kind = tuple[torch.device, int, int, int]


class Sizes(TypedDict, total=False):
    """The sizes of a cache that a caller of the adapters chooses; `CacheSpec` describes them."""

    page_size: int
    rollback: int
    interval: int
    max_bytes: int | None
    max_tokens: int | None
    at_cap: AtCap


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raises TypeError for a word that names no size."""
    names = list(Sizes.__annotations__)
    for name in sizes:
        if name not in names:
            hint = instead(name, sizes[name], names)
            if name in ("backend", "window"):
                hint = f"; write CachePipeline({name}={sizes[name]!r})"
            raise TypeError(f"{name}: wanted one of {', '.join(names)}, got {name!r}{hint}")


def _windows(value: Any) -> Any:
    """A tuple; what is no sequence is left to the validator."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return tuple(value) if listed else value


def _sliding(instance: CacheSpec, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"sliding: wanted a window or None for each layer, got {shown(value)}")
    for window in value:
        if window is not None:
            check_int("sliding", window, 1)
    if value and len(value) != instance.layers:
        raise ValueError(
            f"sliding: wanted one entry for each of {instance.layers} layers, got {len(value)}"
        )


def _dtype(instance: CacheSpec, attribute: attrs.Attribute[Any], value: Any) -> None:
    check_dtype("dtype", value)


def _device(value: Any, name: str = "device") -> torch.device:
    wanted = f"{name}: wanted a torch.device or its name, such as 'cpu' or 'cuda:0'"
    if not isinstance(value, torch.device | str):
        raise TypeError(f"{wanted}, got {shown(value)}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{wanted}, got {shown(value)}") from error


def _devices(value: Any) -> Any:
    listed = _windows(value)
    if not isinstance(listed, tuple):
        raise TypeError(f"devices: wanted a device for each layer, got {shown(value)}")
    return tuple(_device(each, "devices") for each in listed)


def _first_device(spec: CacheSpec) -> torch.device:
    return spec.devices[0] if spec.devices else torch.device("cpu")


def _a_device_each(
    instance: CacheSpec, attribute: attrs.Attribute[Any], value: tuple[torch.device, ...]
) -> None:
    if value and len(value) != instance.layers:
        raise ValueError(
            f"devices: wanted one for each of {instance.layers} layers, got {len(value)}"
        )
    if value and value[0] != instance.device:
        raise ValueError(
            f"device: wanted that of the first layer, {value[0]}, got {instance.device}"
        )


def _each(instance: CacheSpec, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(x, LayerSizes) for x in value):
        raise TypeError(f"per_layer: wanted LayerSizes for each layer, got {shown(value)}")
    if value and len(value) != instance.layers:
        raise ValueError(
            f"per_layer: wanted one entry for each of {instance.layers} layers, got {len(value)}"
        )
    if value and instance.sliding:
        raise ValueError("sliding: wanted () beside per_layer, which gives windows as well")


@named
@attrs.frozen(kw_only=True)
class CacheSpec:
    """Sizes of one model's cache.

    `heads` and `kv_heads` are those present on this rank; `head_offset` is the global id of the
    first KV head and `all_kv_heads` the model's number of them (default: all are here). `scale`
    multiplies q.k (default `head_dim ** -0.5`). `sliding` gives, per layer, the window of layers
    that only slide and None for the others. `per_layer` gives all sizes of each layer, for models
    whose layers differ; the numbers above are then those of the layers that policies manage, or of
    the first of them where these differ. `devices` gives the device of each layer where they are
    several; `device` is then the first layer's. `hidden` are the channels of the attention input,
    for evictions that read it. `dtype` is that of keys and values, as they are stored and computed
    with. `page_size` is in tokens, `rollback` the number of tokens that
    `crop` can take back, `interval` the number of decoded tokens between two decode-time evictions.

    `max_bytes` caps the pages of a cache and its forks, used and reserved (keys, values, positions,
    summaries; rings and tables come on top). Where layers lie on several devices, or their heads
    differ in size, the layers of each kind have the part of it that a token takes there.
    `max_tokens` caps the tokens of every KV head of a sequence, the window included. What a call
    would write beyond a cap raises CapacityError and changes nothing (`at_cap="raise"`), or the
    pipeline's eviction first makes room for it, whatever its own budget ("evict").
    """

    layers: int = attrs.field(validator=positive)
    heads: int = attrs.field(validator=positive)
    kv_heads: int = attrs.field(validator=positive)
    head_dim: int = attrs.field(validator=positive)
    devices: tuple[torch.device, ...] = attrs.field(
        default=(), converter=_devices, validator=_a_device_each
    )
    dtype: torch.dtype = attrs.field(default=torch.float32, validator=_dtype)
    device: torch.device = attrs.field(
        default=attrs.Factory(_first_device, takes_self=True), converter=_device
    )
    scale: float | None = attrs.field(
        default=None,
        validator=optional(a_factor),
    )
    sliding: tuple[int | None, ...] = attrs.field(
        default=(), converter=_windows, validator=_sliding
    )
    per_layer: tuple[LayerSizes, ...] = attrs.field(default=(), converter=_windows, validator=_each)
    hidden: int | None = attrs.field(default=None, validator=optional(positive))
    page_size: int = attrs.field(default=16, validator=positive)
    rollback: int = attrs.field(default=32, validator=not_negative)
    interval: int = attrs.field(default=16, validator=positive)
    head_offset: int = attrs.field(default=0, validator=not_negative)
    all_kv_heads: int | None = attrs.field(default=None, validator=optional(positive))
    max_bytes: int | None = attrs.field(default=None, validator=optional(integer(1, MOST_INT)))
    max_tokens: int | None = attrs.field(default=None, validator=optional(positive))
    at_cap: AtCap = attrs.field(default="raise", validator=one_of(*get_args(AtCap)))

    def __attrs_post_init__(self) -> None:
        check_groups(self.heads, self.kv_heads)
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size: wanted a power of two, got {self.page_size}")
        here = self.head_offset + self.kv_heads
        if self.all_kv_heads is not None and self.all_kv_heads < here:
            raise ValueError(
                f"all_kv_heads: wanted at least head_offset + kv_heads = {here}, got "
                f"{self.all_kv_heads}"
            )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def model_kv_heads(self) -> int:
        """KV heads of the whole model, over all ranks."""
        return self.kv_heads + self.head_offset if self.all_kv_heads is None else self.all_kv_heads

    @property
    def softmax_scale(self) -> float:
        """What multiplies q.k: `scale`, by default head_dim ** -0.5."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def head_ids(self) -> range:
        """The global ids of the KV heads on this rank."""
        return range(self.head_offset, self.head_offset + self.kv_heads)

    @cached_property
    def each(self) -> tuple[LayerSizes, ...]:
        """The sizes of every layer."""
        if self.per_layer:
            return self.per_layer
        return tuple(
            LayerSizes(
                heads=self.heads,
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                scale=self.softmax_scale,
                window=self.sliding[layer] if self.sliding else None,
            )
            for layer in range(self.layers)
        )

    def device_of(self, layer: int) -> torch.device:
        """Where a layer's keys and values lie."""
        return self.devices[layer] if self.devices else self.device

    def kind_of(self, layer: int) -> Kind:
        """What layers that share a pool of pages agree in."""
        return self.device_of(layer), *self.at(layer).pages

    def at(self, layer: int) -> LayerSizes:
        """The sizes of one layer."""
        return self.each[layer]

    def slides(self, layer: int) -> int | None:
        """The window of a layer that only slides, None for a layer that policies manage."""
        return self.each[layer].window

    @property
    def token_widths(self) -> dict[Kind, int]:
        """Channels of a token's keys and values in the layers that policies manage, by kind."""
        found: dict[Kind, int] = {}
        for layer in self.managed:
            sizes, kind = self.at(layer), self.kind_of(layer)
            width = sizes.kv_heads * (sizes.head_dim + sizes.value_dim)
            found[kind] = found.get(kind, 0) + width
        return found

    @property
    def managed(self) -> tuple[int, ...]:
        """The layers that policies manage."""
        return tuple(layer for layer, sizes in enumerate(self.each) if sizes.window is None)
