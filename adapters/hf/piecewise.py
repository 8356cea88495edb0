"""Short prompt calls as piecewise CUDA graphs: a decoder's forward, cut where its layers attend.

The host needs longer to launch a short prompt's kernels than a GPU to run them. What lies between
two attentions depends on nothing but weights and the number of columns, so its graphs serve every
cache; columns are filled up to the next size that has graphs. What the cache does of a layer runs
between two graphs, as ever.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import KVPolicyCache
from .capture import ONE_CAPTURE
from .faces import KVRef

# What says something of each column, and the axis that counts them.
COLUMNS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1}
_HANDED_ON = ("last_hidden_state", "past_key_values")
_ASKING = "masking_utils"  # of transformers: makes masks, which we do not read


class Cut(NamedTuple):
    """Where a layer attends: what it is given, in the graphs' memory, and where its answer goes.

    Shapes are `[1, H, S, D]`, `hidden` `[1, S, hidden]`, `out` `[1, S, Hq, Dv]`.
    """

    layer: int
    key: Tensor
    value: Tensor
    query: Tensor
    pre: Tensor | None
    query_pre: Tensor | None
    hidden: Tensor | None
    sinks: Tensor | None
    out: Tensor

    def attend(self, cache: KVPolicyCache, columns: int) -> None:
        """Attention of the first `columns`."""
        handle = cache.hold(self.layer, self.key[:, :, :columns], self.value[:, :, :columns])
        pre = None if self.pre is None else self.pre[:, :, :columns]
        query_pre = None if self.query_pre is None else self.query_pre[:, :, :columns]
        hidden = None if self.hidden is None else self.hidden[:, :columns]
        query = self.query[:, :, :columns]
        self.out[:, :columns].copy_(cache.attend(handle, query, pre, query_pre, hidden, self.sinks))


class Graph:
    """A CUDA graph of what runs between `begin` and `end`, in memory that many graphs share."""

    def __init__(self, pool: Any) -> None:
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    def begin(self) -> None:
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self.graph.capture_end()

    def replay(self) -> None:
        self.graph.replay()

    @staticmethod
    @contextlib.contextmanager
    def capturing(device: torch.device) -> Iterator[Any]:
        """A stream to capture on, for the one capture of this process."""
        with ONE_CAPTURE:
            torch.cuda.synchronize(device)
            with torch.cuda.stream(_stream(device)):
                yield

    @staticmethod
    def held(x: Tensor) -> Tensor:
        """`x` without a hold on its memory, which later pieces use again."""
        return torch.as_tensor(_Memory(x), device=x.device).view(x.dtype)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Memory:
    """Memory of a tensor as others see it."""

    def __init__(self, x: Tensor) -> None:
        size = x.element_size()
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape), "strides": tuple(n * size for n in x.stride()),
            "typestr": f"<i{size}", "data": (x.data_ptr(), False), "version": 3,
        }  # fmt: skip


class CapturedForward:
    """The graphs of one decoder's forward over so many columns, and what it is told of them."""

    def __init__(
        self, forward: Callable[..., Any], cache: KVPolicyCache, kwargs: dict[str, Any],
        columns: int, pool: Any,
    ) -> None:  # fmt: skip
        self.pool = pool
        self.graphs: list[Any] = []
        self.cuts: list[Cut] = []
        self.inputs = {name: _padded(x, name, columns) for name, x in told_of(kwargs).items()}
        self.dry = True
        given = kwargs | self.inputs
        if "attention_mask" in given:
            given["attention_mask"] = None
        cache.pieces = self
        try:
            forward(**given)  # compiles, and loads kernels: neither may happen in a capture
            self.dry = False
            with Graph.capturing(cache.spec.device):
                self._begin()
                try:
                    output = forward(**given)
                finally:
                    self.graphs[-1].end()
        finally:
            cache.pieces = None
        more = [name for name in output if name not in _HANDED_ON and output[name] is not None]
        if more:
            raise RuntimeError(f"its output has {', '.join(more)}")
        self.kind, self.hidden = type(output), Graph.held(output.last_hidden_state)

    def _begin(self) -> None:
        self.graphs.append(Graph(self.pool))
        self.graphs[-1].begin()

    def cut(
        self, handle: KVRef, query: Tensor, pre: Tensor | None, query_pre: Tensor | None,
        hidden: Tensor | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """In place of a layer's attention while graphs are made; nothing is attended to."""
        batch, heads, columns, _ = query.shape
        # Columns beyond a call's are read by what follows: zeros, whatever lay there.
        out = query.new_zeros(batch, columns, heads, handle.value.shape[3])
        if self.dry:
            return out
        self.graphs[-1].end()
        given: Any = handle.key, handle.value, query, pre, query_pre, hidden, sinks, out
        held: list[Any] = [None if x is None else Graph.held(x) for x in given]
        self.cuts.append(Cut(handle.layer, *held))
        self._begin()
        return out

    def asked(self) -> None:
        """The forward asks how long the cache is: a graph would hold the answer fast."""
        frame = sys._getframe(2)
        while frame.f_back is not None and "cache_utils" in frame.f_code.co_filename:
            frame = frame.f_back
        if _ASKING not in frame.f_code.co_filename:
            raise RuntimeError(f"{frame.f_code.co_qualname} asks how long the cache is")

    def replay(self, cache: KVPolicyCache, kwargs: dict[str, Any], columns: int) -> Any:
        """The forward's output for `columns` of them, no more than there are."""
        for name, x in told_of(kwargs).items():
            self.inputs[name].narrow(COLUMNS[name], 0, columns).copy_(x)
        for n, graph in enumerate(self.graphs):
            graph.replay()
            if n < len(self.cuts):
                self.cuts[n].attend(cache, columns)
        hidden = self.hidden[:, :columns].clone()
        return self.kind(last_hidden_state=hidden, past_key_values=cache)


def told_of(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """What a forward is told of its columns."""
    return {name: kwargs[name] for name in COLUMNS if kwargs.get(name) is not None}


def _padded(x: Tensor, name: str, columns: int) -> Tensor:
    """Memory for `x` of so many columns, filled with zeros."""
    return x.new_zeros(_padded_shape(x, name, columns))


def _padded_shape(x: Tensor, name: str, columns: int) -> list[int]:
    shape = list(x.shape)
    shape[COLUMNS[name]] = columns
    return shape


def kinds(told: dict[str, Tensor]) -> tuple[Any, ...]:
    """What graphs are made for beside the number of columns."""
    return tuple((name, x.dtype, *_padded_shape(x, name, 0)) for name, x in told.items())


def new_pool() -> Any:
    """Memory that graphs share."""
    return torch.cuda.graph_pool_handle()
