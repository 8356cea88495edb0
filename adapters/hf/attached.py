"""An attachment as the modules below `attach` see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from ...pipeline import CachePipeline
from ...spec import CacheSpec, Sizes
from .cache import KVPolicyCache
from .config_names import ConfigNames
from .models import Served
from .ranks import Ranks


class Holder(Protocol):
    """Who lets one thread at a time run the model."""

    expected: KVPolicyCache | None
    planned: Any  # see `Planned`
    moving: list[Any]  # see `moved.counting`

    def holding(self) -> AbstractContextManager[None]: ...


class Attached(Protocol):
    """A pipeline on a model; see `Attachment`, which is one.

    `model` is what was attached to, `base` transformers' model inside its wrappers, `decoder` its
    decoder stack with attention modules `layers`, `served` what is known of it, `kinds` what its
    config said of them, `names` what says that they are ours. `original` is the
    `generate` that ours replaces, `ranks` those that share the model's heads;
    `put_aside` are the columns after which the model gives caches up. Caches are made with `dtype`
    and `sizes`, which give `spec`; `attached` until it is detached.
    """

    model: Any
    base: Any
    decoder: Any
    layers: list[Any]
    served: Served
    kinds: dict[str, Any]
    names: ConfigNames
    pipeline: CachePipeline
    decoding: str
    ranks: Ranks
    idle: dict[int, KVPolicyCache]
    put_aside: int | None
    dtype: torch.dtype | None
    sizes: Sizes

    @property
    def original(self) -> Callable[..., Any]: ...

    @property
    def attached(self) -> bool: ...

    @property
    def spec(self) -> CacheSpec: ...

    @property
    def compiled(self) -> object | None: ...

    @property
    def forwards(self) -> Holder: ...

    @property
    def prompts(self) -> str: ...

    @property
    def cache(self) -> KVPolicyCache | None: ...

    def cache_for(self, given: Any, name: str = ...) -> KVPolicyCache: ...

    def used(self, cache: KVPolicyCache) -> None: ...
