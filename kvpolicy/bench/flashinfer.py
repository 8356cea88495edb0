"""FlashInfer's paged decode over a layer's tokens and page tables, to compare with.

Its requests have the same length in every head, ours do not: each KV head becomes a request of one
KV head and its query heads. In its favour, it reads one piece of memory (our pool is many), and
`plan`, which runs on the host whenever a length changes, is not timed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .context import Bench
from .layer import Layer
from .timing import captured_ms

KINDS = {"tensor cores": True, "CUDA cores": False}
WORKSPACE = 128 << 20  # bytes, what FlashInfer recommends


class Paged:
    """A copy of a layer's pool in one piece, and for each buffer set the pages of every head.

    A head's recent tokens follow its stored ones: in the rest of its last page, then in further
    pages. `lists` holds for each set where its heads' pages start, the pages, and the tokens in
    each head's last page.
    """

    def __init__(self, layer: Layer) -> None:
        page, window, extents = layer.pool.page_size, layer.window, layer.pool.extents
        used = [-(-n // page) for n in layer.lengths]
        needed = [-(-(n + window) // page) for n in layer.lengths]
        more = len(layer.tables) * (sum(needed) - sum(used))
        self.k = _joined([extent[0] for extent in extents], more)
        self.v = _joined([extent[1] for extent in extents], more)
        new = torch.arange(len(self.k) - more, len(self.k), dtype=torch.int32).to(self.k.device)
        starts = torch.tensor([0, *needed]).cumsum(0).int()
        ends = torch.tensor([(n + window - 1) % page + 1 for n in layer.lengths]).int()
        slots = layer.rings[0][0].shape[2]
        back = torch.arange(window - 1, -1, -1, device=new.device)  # oldest first
        recent = (int(layer.now) - back) % slots
        self.lists: list[tuple[Tensor, Tensor, Tensor]] = []
        for (table, _), ring in zip(layer.tables, layer.rings, strict=True):
            pages = []
            for head, n in enumerate(layer.lengths):
                count = needed[head] - used[head]
                pages.append(torch.cat([table[0, head, : used[head]], new[:count]]))
                new = new[count:]
                token = torch.arange(n, n + window, device=new.device)
                at = pages[-1][token // page].long(), token % page
                self.k[at], self.v[at] = (x[0, head, recent] for x in ring[:2])
            self.lists.append((starts, torch.cat(pages), ends))


def _joined(parts: list[Tensor], more: int) -> Tensor:
    return torch.cat([*parts, parts[0].new_zeros(more, *parts[0].shape[1:])])


def flashinfer_ms(bench: Bench, name: str, layer: Layer) -> float | None:
    """Time of the faster of FlashInfer's kernels; None, and a line of text, where none runs."""
    absent = bench.shared.setdefault("no FlashInfer", set())  # a build that fails takes minutes
    kinds = KINDS.keys() - absent
    if not kinds:
        return None
    try:
        wrapper = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    except ImportError as error:
        absent |= kinds
        bench.say(f"no FlashInfer: {error}")
        return None
    paged, found = Paged(layer), {}
    for kind in sorted(kinds):
        try:
            make = functools.partial(wrapper, use_tensor_cores=KINDS[kind], backend="fa2")
            calls = _calls(make, layer, paged)
            for index, call in enumerate(calls[:2]):
                layer.check(f"{name} FlashInfer", index, out=call().view_as(layer.queries[index]))
            found[kind] = captured_ms(calls, bench.device)
        except Exception as error:  # whatever ails it, our own row counts
            absent.add(kind)
            bench.say(f"FlashInfer, {kind}: {error!r}"[:300])
    if found:
        bench.say("FlashInfer: " + ", ".join(f"{k} {1e3 * ms:.4g} us" for k, ms in found.items()))
    return min(found.values(), default=None)


def _calls(make: Callable[..., Any], layer: Layer, paged: Paged) -> list[Callable[[], Tensor]]:
    """One planned call for each buffer set; they share the scratch memory."""
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=paged.k.device)
    group = layer.heads // layer.kv_heads
    stores = paged.k.unsqueeze(2), paged.v.unsqueeze(2)
    calls: list[Callable[[], Tensor]] = []
    for query, lists in zip(layer.queries, paged.lists, strict=True):
        planned = make(workspace)
        planned.plan(
            *lists, group, 1, layer.dim, layer.pool.page_size, q_data_type=query.dtype,
            kv_data_type=query.dtype, sm_scale=layer.dim**-0.5,
        )  # fmt: skip
        calls.append(functools.partial(planned.run, query.view(-1, group, layer.dim), stores))
    return calls
