"""The sizes of a cache."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch

from ._validate import one_of, positive


def _windows(value: Iterable[int | None]) -> tuple[int | None, ...]:
    return tuple(value)


def _sliding(
    instance: CacheSpec, attribute: attrs.Attribute, value: tuple[int | None, ...]
) -> None:
    if value and len(value) != instance.layers:
        raise ValueError(
            f"sliding: wanted one entry for each of {instance.layers} layers, got {len(value)}"
        )
    for window in value:
        if window is not None and window < 1:
            raise ValueError(f"sliding: wanted None or a window of at least 1, got {window}")


@attrs.frozen(kw_only=True)
class LayerSizes:
    """Sizes of one layer.

    `heads` and `kv_heads` on this rank, `head_dim` of keys and values; `scale` multiplies q.k;
    `window` is that of a layer that only slides, None for one that policies manage.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None


@attrs.frozen(kw_only=True)
class CacheSpec:
    """Sizes of one model's cache.

    `heads` and `kv_heads` are those present on this rank; `head_offset` is the global id of the
    first KV head and `all_kv_heads` the model's number of them (default: all are here). `scale`
    multiplies q.k (default `head_dim ** -0.5`). `sliding` gives, per layer, the window of layers
    that only slide and None for the others. `page_size` is in tokens, `rollback` the number of
    tokens that `crop` can take back, `interval` the number of decoded tokens between two
    decode-time evictions.

    `max_bytes` caps the pages of a cache and its forks, used and reserved (keys, values, positions,
    summaries; rings and tables come on top). `max_tokens` caps the tokens of every KV head of a
    sequence, the window included. What a call would write beyond a cap raises CapacityError and
    changes nothing (`at_cap="raise"`), or the pipeline's eviction first makes room for it, whatever
    its own budget ("evict"; see `kvpolicy.caps`).
    """

    layers: int = attrs.field(validator=positive)
    heads: int = attrs.field(validator=positive)
    kv_heads: int = attrs.field(validator=positive)
    head_dim: int = attrs.field(validator=positive)
    dtype: torch.dtype = torch.float32
    device: torch.device = attrs.field(default=torch.device("cpu"), converter=torch.device)
    scale: float | None = None
    sliding: tuple[int | None, ...] = attrs.field(
        default=(), converter=_windows, validator=_sliding
    )
    page_size: int = attrs.field(default=16, validator=positive)
    rollback: int = attrs.field(default=32, validator=attrs.validators.ge(0))
    interval: int = attrs.field(default=16, validator=positive)
    head_offset: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    all_kv_heads: int | None = None
    max_bytes: int | None = attrs.field(default=None, validator=attrs.validators.optional(positive))
    max_tokens: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(positive)
    )
    at_cap: str = attrs.field(default="raise", validator=one_of("raise", "evict"))

    def __attrs_post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads: wanted a multiple of kv_heads={self.kv_heads}, got {self.heads}"
            )
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size: wanted a power of two, got {self.page_size}")

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
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def head_ids(self) -> range:
        """The global ids of the KV heads on this rank."""
        return range(self.head_offset, self.head_offset + self.kv_heads)

    def at(self, layer: int) -> LayerSizes:
        """The sizes of one layer."""
        return LayerSizes(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.softmax_scale,
            window=self.slides(layer),
        )

    def slides(self, layer: int) -> int | None:
        """The window of a layer that only slides, None for a layer that policies manage."""
        return self.sliding[layer] if self.sliding else None
