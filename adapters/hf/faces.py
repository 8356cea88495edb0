"""What transformers sees of a cache: a layer without tensors, and a handle for keys and values."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...errors import PhaseError, UnsupportedError

NAME = "kvpolicy"  # of the attention and the mask function


class Owner(Protocol):
    """The cache behind them."""

    @property
    def columns(self) -> int: ...

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> Any: ...

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pre: Tensor | None,
        hidden: Tensor | None,
    ) -> Tensor: ...


class KVRef:
    """What `update` returns for keys and values: a handle that only our attention understands."""

    def __init__(self, cache: Owner, key: Tensor, value: Tensor) -> None:
        self.cache, self.key, self.value = cache, key, value

    @property
    def shape(self) -> Any:
        raise PhaseError(
            f"a KVPolicyCache needs the attention implementation {NAME!r}: run inside "
            "attach(model, pipeline)"
        )


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
    """One layer's face towards transformers; everything is in the cache's state."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    keys: Any = _NoTensor()
    values: Any = _NoTensor()

    def __init__(self, cache: Owner, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Weak: a cycle would keep a dropped cache's pages until the collector happens to run.
        self._cache, self.index = weakref.ref(cache), index
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
        key, value = self.cache.update(key_states, value_states, self.index)
        return key, value

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        """Nothing: pages stay where they are."""

    prefetch = offload
