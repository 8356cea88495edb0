"""The contract of the ops: their signatures, what they compute, and the values that they exchange.

`load` finds an implementation: `reference` (torch, which defines the result) or `kernels`
(Triton). `write_gate`, `prefill_attention` and `paged_decode` are also functions of this module,
for users who bring their own cache: on CUDA tensors they run the kernel where Triton is installed,
else the reference.

In shapes, B counts sequences, H heads (Hq of queries, Hkv of keys and values; a group of Hq / Hkv
query heads shares a KV head), T or N tokens, D channels of queries and keys, Dv those of values
and outputs, M pages of a table row, P tokens of a page. Positions and lengths count tokens; token n
of a head is the n-th one that it stores.
"""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from ..backend import implementation, resolve
from .attention import Attention
from .checks import check_asked as check_asked
from .checks import check_minmax as check_minmax
from .choosing import Choosing
from .moving import Moving
from .scoring import Scoring
from .values import ADMITTED as ADMITTED
from .values import MARKED as MARKED
from .values import POSITION_BITS as POSITION_BITS
from .values import POSITION_MASK as POSITION_MASK
from .values import Arenas as Arenas
from .values import Bounds as Bounds
from .values import Heads as Heads
from .values import Numbers as Numbers
from .values import Pages as Pages
from .values import Pairs as Pairs
from .values import Position as Position
from .values import Ring as Ring
from .values import Segments as Segments
from .values import TileReads as TileReads
from .values import pages_of as pages_of
from .values import ring_positions as ring_positions
from .values import ring_slot as ring_slot
from .values import tile_span as tile_span
from .values import tile_spans as tile_spans
from .values import whole_lags as whole_lags
from .writing import Writing


class Ops(Writing, Attention, Choosing, Scoring, Moving, Protocol):
    """The ops of one backend.

    Both backends raise ValueError or TypeError before anything is written. Kernels compute in
    float32, bfloat16 and float16 and refuse float64, which the reference takes; what they write in
    place wants a contiguous last dimension, and attention at most 512 channels. A product q.k in
    float16, whose range it may exceed, is scaled before it is rounded.

    What attention may be given besides:
    `softcap`: logits are softcap * tanh(scale * q.k / softcap) (Gemma 2).
    `sinks` `[Hq]` floats: a logit of each query head, neither scaled nor capped, that joins its
    softmax's denominator and has no value (gpt-oss).
    `chunk`: a query at position i sees none but the keys j with j // chunk == i // chunk (Llama 4).
    """

    backend: str


def load(name: str) -> Ops:
    """The ops of a resolved backend, "reference" or "triton"."""
    return cast(Ops, implementation(name))


def write_gate(
    key_pre: Tensor, key: Tensor, norm_pre: Tensor, norm_post: Tensor, w1: Tensor, b1: Tensor,
    w2: Tensor, b2: Tensor, limit: float | None = None, inclusive: bool = False,
    silu: bool = False,
) -> Tensor:  # fmt: skip
    """Gate scores or decisions `[Hkv, T]`; see `Ops.write_gate`."""
    weights = (norm_pre, norm_post, w1, b1, w2, b2)
    return _ops(key).write_gate(key_pre, key, *weights, limit, inclusive, silu)


def prefill_attention(
    query: Tensor, key: Tensor, value: Tensor, flags: Tensor, segments: Segments, pages: Pages,
    heads: Heads, window: int, scale: float, bounds: Bounds | None = None, *,
    softcap: float | None = None, sinks: Tensor | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Admission-sparse attention `[Hq, Tq, Dv]`; see `Ops.prefill_attention`."""
    recent = (key, value, flags)
    return _ops(query).prefill_attention(
        query, *recent, segments, pages, heads, window, scale, bounds,
        softcap=softcap, sinks=sinks, chunk=chunk,
    )  # fmt: skip


def paged_decode(
    query: Tensor, pages: Pages, heads: Heads, ring: Ring, lengths: Tensor, active: Tensor,
    window: int, scale: float, selected: Tensor | None = None, *,
    softcap: float | None = None, sinks: Tensor | None = None, chunk: int | None = None,
    rows: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Ragged paged attention `[B, Hq, Dv]`; see `Ops.paged_decode`."""
    return _ops(query).paged_decode(
        query, pages, heads, ring, lengths, active, window, scale, selected,
        softcap=softcap, sinks=sinks, chunk=chunk, rows=rows,
    )  # fmt: skip


def _ops(probe: Tensor) -> Ops:
    return load(resolve("auto", probe.device))
