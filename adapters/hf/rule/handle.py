"""The cache of a probe: it hands out handles, and anything that a model does with one raises."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from .kinds import LayerKind

_HERE = os.path.dirname(os.path.abspath(__file__))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_TRANSFORMERS = os.path.dirname(os.path.abspath(transformers.__file__))
_MODELS = os.path.join(_TRANSFORMERS, "models")
_OPERATORS = (
    "getitem setitem iter len bool contains add radd sub rsub mul rmul truediv rtruediv floordiv "
    "matmul rmatmul pow neg abs lt le gt ge float int index array"
)


class Touched(AttributeError):
    """A model used the handle of its cached keys; an AttributeError, so that `hasattr` says no."""


class Handle:
    """Stands for the keys and values that a layer has cached."""

    def __init__(self, layer: StoredLayer) -> None:
        self.__dict__["layer"] = layer

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Handle:
        """Itself: a model may bring what it shares to the device of a layer."""
        if isinstance(device, torch.dtype) or not isinstance(device, torch.device | str):
            raise Touched("it reads .to of its cached keys or values")
        return self

    def __getattr__(self, name: str) -> Any:
        raise Touched(f"it reads .{name} of its cached keys or values")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        raise Touched(f"it calls torch's {name} on its cached keys or values")


def _raising(name: str) -> Callable[..., Any]:
    def method(self: Handle, *args: Any) -> Any:
        raise Touched(f"it uses its cached keys or values by {name}")

    return method


for _name in _OPERATORS.split():
    setattr(Handle, f"__{_name}__", _raising(f"__{_name}__"))


class StoredLayer(CacheLayerMixin):
    """Keys `[B, Hkv, T, D]` and values `[B, Hkv, T, Dv]` of all tokens, behind a handle.

    Attributes:
        index: of the layer in its cache.
        stored, values_stored: what was cached so far; None before the first forward.
        fresh: the keys of the last update alone, `[B, Hkv, S, D]`.
        updates: since `begin`.
        reads: attention calls that read it since its last update.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, index: int, notice: Callable[[StoredLayer], None]) -> None:
        self.index, self.notice = index, notice
        self.is_initialized = True
        self.stored: Tensor | None = None
        self.values_stored: Tensor | None = None
        self.fresh: Tensor | None = None
        self.updates = self.reads = 0

    def __getattribute__(self, name: str) -> Any:
        """For models that look into the cache itself, keys and values are a handle too."""
        return Handle(self) if name in ("keys", "values") else super().__getattribute__(name)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `update` keeps what comes."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.fresh = key_states
        self.updates, self.reads = self.updates + 1, 0
        self.notice(self)
        if not isinstance(key_states, Tensor) or not isinstance(value_states, Tensor):
            raise Touched("it caches what are no tensors")
        if key_states.ndim != 4 or value_states.shape[:3] != key_states.shape[:3]:
            raise Touched(
                f"it caches keys of shape {tuple(key_states.shape)} and values of shape "
                f"{tuple(value_states.shape)}, wanted [B, Hkv, S, D]"
            )
        before, values = self.stored, self.values_stored
        self.stored = key_states if before is None else torch.cat([before, key_states], 2)
        self.values_stored = (
            value_states if values is None else torch.cat([values, value_states], 2)
        )
        handle = Handle(self)
        return handle, handle

    def get_seq_length(self) -> int:
        return 0 if self.stored is None else self.stored.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class HybridLayer(LinearAttentionLayer, StoredLayer):
    """The same, of a layer that also keeps a state of transformers' own."""

    is_compileable = False
    is_croppable = False

    def __init__(self, index: int, notice: Callable[[StoredLayer], None], states: int) -> None:
        StoredLayer.__init__(self, index, notice)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)


class ProbeCache(Cache):
    """A cache of stored layers, and of transformers' own where a layer keeps no keys."""

    def __init__(self, kinds: Sequence[LayerKind], notice: Callable[[StoredLayer], None]) -> None:
        layers: list[Any] = []
        for index, kind in enumerate(kinds):
            if kind.kind == "hybrid":
                layers.append(HybridLayer(index, notice, kind.states))
            elif kind.attention:
                layers.append(StoredLayer(index, notice))
            elif kind.own:
                layers.append(LinearAttentionLayer(number_of_states=kind.states))
            elif hasattr(cache_utils, "DummyLayer"):
                layers.append(cache_utils.DummyLayer())
            elif kind.kind == "none":  # as transformers did before it had that
                layers.append(LinearAttentionLayer())
        super().__init__(layers=layers)
        self.counted: dict[int, str] = {}  # where a module asked how long the cache is, by its id

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        frame = sys._getframe(1)
        asker = frame.f_locals.get("self")
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        self.counted.setdefault(id(asker), place)
        return int(super().get_seq_length(*args, **kwargs))

    @property
    def stored(self) -> list[StoredLayer]:
        return [layer for layer in self.layers if isinstance(layer, StoredLayer)]

    def begin(self) -> None:
        """Counts updates anew, for the next forward."""
        for layer in self.stored:
            layer.updates = layer.reads = 0


def place_of(error: BaseException) -> tuple[str, str]:
    """Where in a model's code `error` was raised: "file.py:line", and the line itself."""
    found: tuple[str, str] = ("", "")
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        file = os.path.abspath(code.co_filename)
        library = file.startswith((_HERE, _TORCH, _TRANSFORMERS)) and not file.startswith(_MODELS)
        if not library and "<" not in code.co_filename:
            found = (
                f"{os.path.basename(file)}:{trace.tb_lineno}",
                linecache.getline(file, trace.tb_lineno).strip(),
            )
        trace = trace.tb_next
    return found
