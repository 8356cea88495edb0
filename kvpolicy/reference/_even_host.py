"""`attend_even` with numpy's products, on a CPU with a thread or two.

For the few queries of a group they take two thirds of the time of torch's, which share heads out
between threads; the keys and values of a token are read at the speed of the memory.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from ..ops import Pages, Ring
from ._even import hidden_slots
from ._logits import softmax
from ._lying import Row, lying, row_of

THREADS = 2  # of torch, up to which this is faster
ALONE = 1 << 18  # multiplications of a product up to which OpenBLAS keeps to one thread


def serves(query: Tensor, pages: Pages, ring: Ring) -> bool:
    """Whether a query `[1, Hq, D]` is attended to here: several of a group, in full precision."""
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and type(query) is type(pages.k) is Tensor
        and query.dtype == ring.k.dtype == ring.v.dtype
        and query.shape[1] > ring.k.shape[1]
        and torch.get_num_threads() <= THREADS
    )


def attend_on_host(
    query: Tensor, pages: Pages, table: Tensor, held: int, ring: Ring, length: int, window: int,
    scale: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention `[1, Hq, Dv]` over `held` global tokens and the window that ends at `length`."""
    keys, values = [ring.k.numpy()[0]], [ring.v.numpy()[0]]
    heads, slots, dim = keys[0].shape
    if held:
        row = row_of(table, -(-held // pages.k.shape[1]))
        keys, values = _parts(pages.k, row, held) + keys, _parts(pages.v, row, held) + values
    q = query.detach().numpy().reshape(heads, -1, dim) * scale
    group, value_dim = q.shape[1], values[0].shape[2]
    spans = _spans([x.shape[1] for x in keys], max(ALONE // (group * max(dim, value_dim)), 1))
    scores = numpy.empty((heads, held + slots, group), q.dtype)
    turned = numpy.ascontiguousarray(q.transpose(0, 2, 1))
    for part, low, high, at in spans:  # a product for each head, of which none is a copy
        numpy.matmul(keys[part][:, low:high], turned, out=scores[:, at : at + high - low])
    logits = torch.from_numpy(scores).transpose(1, 2)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    for low, high in hidden_slots(slots, length, window):
        scores[:, held + low : held + high] = -numpy.inf
    weights = softmax(logits, None if sinks is None else sinks.view(heads, -1)).numpy()
    out = numpy.zeros((heads, group, value_dim), q.dtype)
    for part, low, high, at in spans:
        out += numpy.matmul(weights[:, :, at : at + high - low], values[part][:, low:high])
    return torch.from_numpy(out).view(1, -1, value_dim)


def _parts(store: Tensor, row: Row, held: int) -> list[Any]:
    """Tokens `[Hkv, n, D]` of pages that lie in a row, and copies of those of other pages."""
    there = row.length * store.shape[1]
    if held <= there:
        return [lying(store, row, held).numpy()]
    apart = store.numpy().take(row.others.numpy(), 0).reshape(row.heads, -1, store.shape[2])
    apart = apart[:, : held - there]
    return [lying(store, row, there).numpy(), apart] if there else [apart]


def _spans(sizes: list[int], most: int) -> list[tuple[int, int, int, int]]:
    """Pieces of at most so many tokens: the part, from, to, and where they are among all."""
    found, at = [], 0
    for part, size in enumerate(sizes):
        for low in range(0, size, most):
            high = min(low + most, size)
            found.append((part, low, high, at + low))
        at += size
    return found
