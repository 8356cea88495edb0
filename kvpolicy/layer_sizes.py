"""The sizes of one layer of a cache."""

from __future__ import annotations

import attrs

from ._fields import flag, number, optional, positive

a_factor = number("a finite number above 0", lambda x: x > 0)


@attrs.frozen(kw_only=True)
class LayerSizes:
    """Sizes of one layer.

    `heads` and `kv_heads` are those on this rank, `head_dim` of queries and keys and `value_dim` of
    values (default: `head_dim`) in channels. `scale` multiplies q.k (default `head_dim ** -0.5`),
    and `softcap` bounds the product: `softcap * tanh(scale * q.k / softcap)`. `window` is that of a
    layer that only slides, None for one that policies manage. With `chunk`, equal to the window,
    such a layer reads only keys with `position // chunk` equal to the query's. `shared`: layers
    without keys of their own read this one's as well.
    """

    heads: int = attrs.field(validator=positive)
    kv_heads: int = attrs.field(validator=positive)
    head_dim: int = attrs.field(validator=positive)
    value_dim: int = attrs.field(
        default=attrs.Factory(lambda self: self.head_dim, takes_self=True), validator=positive
    )
    scale: float = attrs.field(
        default=attrs.Factory(lambda self: self.head_dim**-0.5, takes_self=True), validator=a_factor
    )
    softcap: float | None = attrs.field(default=None, validator=optional(a_factor))
    window: int | None = attrs.field(default=None, validator=optional(positive))
    chunk: int | None = attrs.field(default=None, validator=optional(positive))
    shared: bool = attrs.field(default=False, validator=flag)

    def __attrs_post_init__(self) -> None:
        check_groups(self.heads, self.kv_heads)
        if self.chunk is not None and self.chunk != self.window:
            raise ValueError(f"chunk: wanted the window, {self.window}, got {self.chunk}")

    @property
    def pages(self) -> tuple[int, int, int]:
        """KV heads, key and value channels: layers that agree in them share a pool."""
        return self.kv_heads, self.head_dim, self.value_dim


def check_groups(heads: int, kv_heads: int) -> None:
    """Raises ValueError unless query heads share KV heads evenly."""
    if heads % kv_heads:
        raise ValueError(f"heads: wanted a multiple of kv_heads={kv_heads}, got {heads}")
