"""Interpreted kernels read and write what they were given only: what a checker sees on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from kvpolicy.store.pool import PagePool
from tests.support.kernels.pool import Pool

Spans = list[tuple[int, int]]


def _merged(spans: Iterable[tuple[int, int]]) -> Any:
    """Addresses `[n, 2]` from and to, in order, those that touch as one."""
    found: list[list[int]] = []
    for low, high in sorted(spans):
        if found and low <= found[-1][1]:
            found[-1][1] = max(high, found[-1][1])
        else:
            found.append([low, high])
    return np.array(found, dtype=np.uint64).reshape(-1, 2)


def _span(x: torch.Tensor) -> Spans:
    if not x.numel():
        return []
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return [(x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size())]


def _given(arguments: Iterable[Any]) -> Spans:
    """The memory of tensors, of those in tuples and of those behind descriptors."""
    found: Spans = []
    for x in arguments:
        if isinstance(x, tuple | list):
            found += _given(x)
        elif isinstance(x, torch.Tensor) or isinstance(getattr(x, "base", None), torch.Tensor):
            found += _span(x if isinstance(x, torch.Tensor) else x.base)
    return found


class _Launch:
    def __init__(self, name: str, arguments: Iterable[Any], pools: list[Any]) -> None:
        extents = [extent for pool in pools for extent in pool.extents]
        self.name, self.memory = name, _merged(_given([*arguments, *extents]))

    def check(self, pointers: Any, mask: Any = None) -> None:
        """Raises AssertionError for an access outside of them."""
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        at = np.asarray(pointers.data, dtype=np.uint64)
        if mask is not None:
            at = at[np.broadcast_to(np.asarray(mask.data, dtype=bool), at.shape)]
        at = _outside(at.ravel(), size, self.memory)
        assert not len(at), f"{self.name}: {len(at)} accesses outside of what it was given"


def _outside(at: Any, size: int, spans: Any) -> Any:
    """The addresses of values of so many bytes that lie in no span."""
    if not len(spans) or not len(at):
        return at
    low, high = int(at.min()), int(at.max()) + size  # of one tensor mostly
    one = int(np.searchsorted(spans[:, 0], np.uint64(low), side="right")) - 1
    if one >= 0 and high <= spans[one, 1]:
        return at[:0]
    place = np.searchsorted(spans[:, 0], at, side="right").astype(np.int64) - 1
    ends = spans[np.maximum(place, 0), 1]
    return at[(place < 0) | (at + np.uint64(size) > ends)]


@contextlib.contextmanager
def within_arguments() -> Iterator[None]:
    """Raises AssertionError where an interpreted kernel reads or writes outside of its arguments.

    Pages lie in slabs, found by their distance from the first: those of all pools made inside pass.
    """
    launches: list[_Launch] = []
    pools: list[Any] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    add, init, run = builder.create_atomic_rmw, executor._init_args_hst, executor.__call__

    def noted(kind: type) -> Any:
        made: Any = kind.__init__  # type: ignore[misc]

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            pools.append(self)

        return init

    def started(self: Any, args: Any, kwargs: Any) -> Any:
        found = init(self, args, kwargs)
        launches.append(_Launch(self.fn.__name__, [*found[0], *found[1].values()], pools))
        return found

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = len(launches)
        try:
            return run(self, *args, **kwargs)
        finally:
            del launches[outer:]

    def loads(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        launches[-1].check(pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def stores(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        launches[-1].check(pointers, mask)
        return store(self, pointers, value, mask, *args, **kwargs)

    def adds(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        launches[-1].check(pointers, mask)
        return add(self, op, pointers, value, mask, *args)

    with contextlib.ExitStack() as stack:
        for kind, name, ours in (
            (builder, "create_masked_load", loads), (builder, "create_masked_store", stores),
            (builder, "create_atomic_rmw", adds), (executor, "_init_args_hst", started),
            (executor, "__call__", launched), (Pool, "__init__", noted(Pool)),
            (PagePool, "__init__", noted(PagePool)),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(kind, name, ours))
        yield
