"""What transformers sees of a cache: a layer without tensors, and a handle for keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Container
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ...errors import PhaseError, UnsupportedError
from .models import Served

NAME = "kvpolicy"  # of the attention and the mask function


class Owner(Protocol):
    """The cache behind them."""

    served: Served
    pieces: Any
    layout: Any

    @property
    def columns(self) -> int: ...

    def counted(self) -> Any: ...

    def attend(
        self,
        handle: KVRef,
        query: Tensor,
        pre: Tensor | None,
        query_pre: Tensor | None,
        hidden: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor: ...


class _Handle:
    """Stands for a tensor that nothing but our attention may read."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Itself: a model may bring what layers share to the device of one of them."""
        return self

    @property
    def of(self) -> KVRef:
        """The handle of the keys."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Raises for an attention that takes it for a tensor."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        if self.of.cache.layout is not None:  # inside a forward of the attached model
            raise UnsupportedError(
                f"layers: [{self.of.place}] of the attached model attend by another attention than "
                "the pipeline's, since they were replaced; detach, change the model, attach again"
            )
        raise PhaseError(
            "past_key_values: the model is not attached, or its attention was changed since, and a "
            "KVPolicyCache serves no other; call it as it is inside attach(model, pipeline)"
        )


class KVRef(_Handle):
    """What `update` returns for keys: a handle of keys and values.

    It knows the layer whose keys it stands for: other layers may read them as well, after that one
    `wrote` them.
    """

    def __init__(self, cache: Owner, place: int | None, key: Tensor, value: Tensor) -> None:
        self.cache, self.place, self.key, self.value = cache, place, key, value
        self.wrote = False

    @property
    def of(self) -> KVRef:
        return self

    @property
    def layer(self) -> int:
        """Our number of the layer."""
        assert self.place is not None
        return self.cache.served.places[self.place]


class ValueRef(_Handle):
    """What `update` returns for values: it tells which keys they go with."""

    def __init__(self, keys: KVRef) -> None:
        self.keys = keys

    @property
    def of(self) -> KVRef:
        return self.keys


class _NoTensor:
    """In place of a layer's keys or values of all tokens, which no tensor holds."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: object, owner: type) -> Any:
        if layer is None:
            return self
        raise UnsupportedError(
            f"{self.name}: heads of a pipeline's cache hold different tokens, in pages; "
            "cache.state.kept(layer, sequence, head) tells which"
        )

    def __set__(self, layer: object, value: object) -> None:
        """transformers' base class sets None."""


class KVPolicyLayer(CacheLayerMixin):
    """One layer's face towards transformers, by its `place`; everything is in the cache's state."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    keys: Any = _NoTensor()
    values: Any = _NoTensor()

    def __init__(self, cache: Owner, place: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weak: a cycle would keep a dropped cache's pages until the collector happens to run.
        self._cache, self.place = weakref.ref(cache), place
        self.is_initialized = True

    @property
    def cache(self) -> Owner:
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The state is made by the model's first forward."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        handle = KVRef(self.cache, self.place, key_states, value_states)
        return handle, ValueRef(handle)

    def get_seq_length(self) -> Any:
        cache = self.cache
        if cache.pieces is not None:
            cache.pieces.asked()
        return cache.counted() if self.place in cache.served.probe.counting else cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        """Nothing: pages stay where they are, and the cache refuses to be offloaded."""

    prefetch = offload


class KVPolicyHybridLayer(KVPolicyLayer, LinearAttentionLayer):
    """A layer that attends and keeps a recurrent or convolutional state, which is transformers'."""

    def __init__(self, cache: Owner, place: int, states: int) -> None:
        KVPolicyLayer.__init__(self, cache, place)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def get_max_length(self) -> int:
        return KVPolicyLayer.get_max_length(self)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)


def keeps_state(face: Any) -> bool:
    """Whether a layer keeps a recurrent or convolutional state."""
    return isinstance(face, LinearAttentionCacheLayerMixin)


def faces_of(cache: Owner, config: Any, places: Container[int]) -> list[Any]:
    """A cache's layers: ours at `places`, transformers' own for what keeps no keys."""
    faces: list[Any] = []
    for place, own in enumerate(DynamicCache(config=config).layers):
        if place not in places:
            faces.append(own)
        elif keeps_state(own):
            states: Any = own
            faces.append(KVPolicyHybridLayer(cache, place, states.number_of_states))
        else:
            faces.append(KVPolicyLayer(cache, place))
    return faces
