"""Attention over chosen blocks in Gluon, for devices of compute capability 9.0.

One warp copies keys and values into shared memory while two groups of four warps, of 64 queries
each, compute: the next product of queries and keys runs beside the softmax of the last one. Copies
are of 128 rows each and stay within their sequence's recent keys, or within one head's gathered
rows (these are padded with zeros), so that nothing of another sequence comes near a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..ops import Segments, TileReads
from ._launch import on
from ._softmax import LOG2E
from .tile_lists import Lists

KEYS = 128  # of a step, and queries of a program
_KEYS = gl.constexpr(KEYS)
_HALF = gl.constexpr(KEYS // 2)
_STAGES = 2
_FAR = gl.constexpr(1 << 30)  # a position that no query reaches
_LOG2E = gl.constexpr(LOG2E)
_DIMS = (64, 128)
# As later Tritons name it, or as earlier ones do.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def fits(
    query: Tensor, value: Tensor, segments: Segments, reads: TileReads, softcap: float | None
) -> bool:
    """Whether this kernel computes such a call."""
    sizes = zip(segments.cu_q, segments.cu_q[1:], segments.cu_k, segments.cu_k[1:], strict=False)
    return (
        query.dtype in _TYPES
        and query.shape[2] == value.shape[2]
        and query.shape[2] in _DIMS
        and reads.tile % KEYS == 0
        and reads.columns is None
        and softcap is None
        and all(q0 == q1 or k1 - k0 >= KEYS for q0, q1, k0, k1 in sizes)
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, far_k: Tensor, far_v: Tensor, at: Tensor,
    blocks: Tensor, lists: Lists, segments: Segments, of: Tensor, tile: int, window: int,
    scale: float, sinks: Tensor | None, out: Tensor, begin: int, many: int,
) -> None:  # fmt: skip
    """Writes `out` `[T, Hq, D]` for `many` parts of tiles, from tile `begin` on."""
    (heads, _, dim), kv_heads, choosing = query.shape, key.shape[0], blocks.shape[0]
    (q_d, *of_q), (k_d, *of_k), (v_d, *of_v) = (
        _rows(x, size) for x, size in ((query, KEYS // 2), (key, KEYS), (value, KEYS))
    )
    far_k_d, far_v_d = (_rows(x[None], KEYS)[0] for x in (far_k, far_v))
    bounds = segments.cu_q_dev, segments.cu_k_dev, segments.start_dev
    with on(query):
        _attend_listed[(heads * many,)](
            q_d, k_d, v_d, far_k_d, far_v_d, at, blocks, *lists, *bounds, of, sinks, out,
            *of_q, *of_k, *of_v, out.stride(0), scale * LOG2E, begin, window, blocks.shape[2],
            of.shape[1], many, lists.whole.shape[2], lists.rest.shape[2],
            GROUP=heads // kv_heads, SHARED=heads // choosing, TILE=tile, DIM=dim, STAGES=_STAGES,
            num_warps=4,
        )  # fmt: skip


def _rows(x: Tensor, size: int) -> tuple[Any, int, int]:
    """A descriptor of `size` rows of `[H, T, D]`; how many rows, and channels, heads lie apart."""
    heads, tokens, dim = x.shape
    apart, step = x.stride(0) if heads > 1 else 0, x.stride(1) if tokens > 1 else dim
    after = step >= dim and apart % step == 0  # head after head
    beside = apart > 0 and (heads - 1) * apart + dim <= step  # heads of a token together
    aligned = all(n * x.element_size() % 16 == 0 for n in (apart, step)) and x.data_ptr() % 16 == 0
    if x.stride(2) != 1 or not aligned or not (after or beside):
        x = x.clone(memory_format=torch.contiguous_format)
        apart, step, after = tokens * dim, dim, True
    if after:
        shape = [(heads - 1) * (apart // step) + tokens, dim]
    else:
        shape = [tokens, (heads - 1) * apart + dim]
    layout = gl.NVMMASharedLayout.get_default_for([size, dim], _TYPES[x.dtype])
    descriptor = TensorDescriptor(x, shape, [step, 1], [size, dim], layout)
    return (descriptor, apart // step, 0) if after else (descriptor, 0, apart)


@gluon.jit
def _masked_step(step, plan, rest):
    """First row that a masked step copies, and the rows from where and up to where it counts.

    Rows are positions for the first steps, those of recent keys, and gathered rows then.
    """
    leads, nears, fars, band, inner, outer, low, end, stop, plain, some, last = plan
    if step < nears:
        first = band + step * _KEYS
        upto = gl.minimum(inner, stop)
        if step >= leads:
            first = outer + (step - leads) * _KEYS
            upto = stop
        upto = gl.minimum(first + _KEYS, upto)
        begin = gl.maximum(gl.minimum(first, end - _KEYS), low)
    else:
        if step < nears + fars:
            first = plain + (step - nears) * _KEYS
            upto = gl.minimum(first + _KEYS, some)
        else:
            code = gl.load(rest + step - nears - fars)
            first = (code // 256).to(gl.int32)
            upto = first + (code % 256).to(gl.int32)
        begin = gl.minimum(first, last)
    return begin, first, upto


@gluon.jit
def _places(step, plan, rest, at, blocks, window, TILE: gl.constexpr, L: gl.constexpr):
    """Positions `[N]` of a masked step's keys; queries see those that lie at least `late` and
    less than `early` before them."""
    begin, first, upto = _masked_step(step, plan, rest)
    row = begin + gl.arange(0, _KEYS, L)
    there = (row >= first) & (row < upto)
    place = gl.where(there, row, _FAR)
    late = window * 0
    early = window
    if step >= plan[1]:
        late = window
        early = window * 0 + _FAR
        place = gl.load(at + row, mask=there, other=_FAR)
        chosen = gl.load(blocks + place // TILE, mask=there, other=0)
        place = gl.where(there & (chosen != 0), place, _FAR)
    return place, late, early


@gluon.jit
def _weigh(s, i, place, late, early, scale, top, total, MASKED: gl.constexpr):
    """Weights of logits, the decay of what came before, the new top and total."""
    if MASKED:
        j = gl.expand_dims(place, 0)
        seen = (j <= gl.expand_dims(i - late, 1)) & (j > gl.expand_dims(i - early, 1))
        s = gl.where(seen, s * scale, float("-inf"))
        new = gl.maximum(top, gl.max(s, 1))
        base = gl.where(new == float("-inf"), 0.0, new)
        weights = gl.exp2(s - gl.expand_dims(base, 1))
    else:
        new = gl.maximum(top, gl.max(s, 1) * scale)
        base = new
        weights = gl.exp2(s * scale - gl.expand_dims(base, 1))
    decay = gl.exp2(top - base)
    return weights, decay, new, total * decay + gl.sum(weights, 1)


@gluon.jit
def _step(
    shared, stage, phase, q, p, acc, i, place, late, early, scale, top, total,
    MASKED: gl.constexpr, STAGES: gl.constexpr, S: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """The product of queries and the next keys, beside that of the last weights and values."""
    k_s, v_s, k_full, k_free, v_full, v_free = shared
    coming = stage + 1
    turned = phase
    if coming == STAGES:
        coming = 0
        turned = phase ^ 1
    zero = gl.zeros([_HALF, _KEYS], gl.float32, S)
    mbarrier.wait(k_full.index(coming), turned)
    s = warpgroup_mma(q, k_s.index(coming).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_free.index(coming), count=1)
    weights, decay, top, total = _weigh(s, i, place, late, early, scale, top, total, MASKED)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(v_free.index(stage), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, A)), 1)
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, A, 2))
    return coming, turned, p, acc, top, total


@gluon.jit
def _compute(
    shared, plan, rest, at, blocks, window, given, WHO: gl.constexpr, SINKS: gl.constexpr,
    TILE: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of 64 queries: over the steps with a mask, then over those without one."""
    q_s, q_bar, masked, steps, scale, sink, out, out_t, first, here, stop, shift = given
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _KEYS, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    R: gl.constexpr = gl.SliceLayout(1, S)
    C: gl.constexpr = gl.SliceLayout(0, S)
    RO: gl.constexpr = gl.SliceLayout(1, A)
    k_s, v_s, k_full, k_free, v_full, v_free = shared
    q = q_s.index(WHO)
    i = first + WHO * _HALF + gl.arange(0, _HALF, R)
    top = gl.full([_HALF], float("-inf"), gl.float32, R)
    total = gl.full([_HALF], 0.0, gl.float32, R)
    acc = gl.zeros([_HALF, DIM], gl.float32, A)
    zero = gl.zeros([_HALF, _KEYS], gl.float32, S)
    stage = 0
    phase = 0
    place, late, early = _places(0, plan, rest, at, blocks, window, TILE, C)
    mbarrier.wait(q_bar, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_s.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free.index(0), count=1)
    weights, _, top, total = _weigh(s, i, place, late, early, scale, top, total, True)
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, A, 2))
    for step in range(1, masked):
        place, late, early = _places(step, plan, rest, at, blocks, window, TILE, C)
        stage, phase, p, acc, top, total = _step(
            shared, stage, phase, q, p, acc, i, place, late, early, scale, top, total, True,
            STAGES, S, A,
        )  # fmt: skip
    for _ in range(masked, steps):
        stage, phase, p, acc, top, total = _step(
            shared, stage, phase, q, p, acc, i, i, 0, 0, scale, top, total, False, STAGES, S, A
        )
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_s.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    if SINKS:
        new = gl.maximum(top, sink)
        decay = gl.exp2(top - new)
        total = total * decay + gl.exp2(sink - new)
        acc = acc * gl.expand_dims(gl.convert_layout(decay, RO), 1)
    total = gl.where(total > 0, total, 1.0)
    acc = acc / gl.expand_dims(gl.convert_layout(total, RO), 1)
    j = first + WHO * _HALF + gl.arange(0, _HALF, RO)
    d = gl.arange(0, DIM, gl.SliceLayout(0, A))
    to = out + gl.expand_dims((j + shift).to(gl.int64) * out_t, 1) + gl.expand_dims(d, 0)
    alive = gl.expand_dims((j >= here) & (j < stop), 1)
    gl.store(to, acc.to(q.dtype), mask=alive & gl.expand_dims(d >= 0, 0))


@gluon.jit
def _copy(
    q_d, k_d, v_d, far_k_d, far_v_d, q_s, q_bar, shared, plan, rest, whole, masked, inners, steps,
    row_q, col_q, row_k, col_k, row_v, col_v, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies the queries, then each step's keys and values as soon as there is room."""
    k_s, v_s, k_full, k_free, v_full, v_free = shared
    nears = plan[1]
    inner = plan[4]
    mbarrier.expect(q_bar, 2 * q_d.block_type.nbytes)
    _load(q_d, [row_q, col_q], q_bar, q_s.index(0))
    _load(q_d, [row_q + _HALF, col_q], q_bar, q_s.index(1))
    stage = 0
    phase = 1
    for step in range(0, steps):
        # Where the step's rows begin, and whether they are recent keys.
        near = step < nears
        if step < masked:
            row, _, _ = _masked_step(step, plan, rest)
        elif step < masked + inners:
            row = inner + (step - masked) * _KEYS
            near = step >= masked  # true, of the type that the other branches have
        else:
            row = gl.load(whole + step - masked - inners)
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_full.index(stage), k_d.block_type.nbytes)
        to = k_s.index(stage)
        if near:
            _load(k_d, [row_k + row, col_k], k_full.index(stage), to)
        else:
            _load(far_k_d, [row, 0], k_full.index(stage), to)
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v_d.block_type.nbytes)
        to = v_s.index(stage)
        if near:
            _load(v_d, [row_v + row, col_v], v_full.index(stage), to)
        else:
            _load(far_v_d, [row, 0], v_full.index(stage), to)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit(do_not_specialize=[
    "begin", "width", "many", "parts", "most_whole", "most_rest", "q_row", "k_row", "v_row",
])  # fmt: skip
def _attend_listed(
    q_d, k_d, v_d, far_k_d, far_v_d, at, blocks, whole, rest, listed, cu_q, cu_k, start, of, sinks,
    out, q_row, q_col, k_row, k_col, v_row, v_col, out_t, scale, begin, window, width, many, parts,
    most_whole, most_rest,
    GROUP: gl.constexpr, SHARED: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A part of a tile of one head; heads of a group together, one KV head after another."""
    pid = gl.program_id(0)
    kv_head = pid // (parts * GROUP)
    head = kv_head * GROUP + pid % GROUP
    nth = parts - 1 - pid % (parts * GROUP) // GROUP  # the longest first
    tile = begin + nth // (TILE // _KEYS)
    b = gl.load(of + tile)
    first = gl.load(of + many + tile) * TILE + nth % (TILE // _KEYS) * _KEYS
    begins = gl.load(start + b)
    q0 = gl.load(cu_q + b)
    end = begins + gl.load(cu_q + b + 1) - q0
    here = gl.maximum(first, begins)
    stop = gl.minimum(first + _KEYS, end)
    k0 = gl.load(cu_k + b)
    low = end - (gl.load(cu_k + b + 1) - k0)  # of the first recent key
    slot = (head // SHARED).to(gl.int64) * parts + nth
    listed += slot * 5
    rests = gl.load(listed + 1)
    plain = gl.load(listed + 2)
    some = gl.load(listed + 3)
    # Recent keys that some queries do not see, that all see, and those up to the last query.
    band = gl.maximum(here - window + 1, low)
    inner = band + gl.maximum(stop - window - band + _KEYS - 1, 0) // _KEYS * _KEYS
    inners = gl.maximum(here + 1 - inner, 0) // _KEYS
    outer = inner + inners * _KEYS
    leads = gl.maximum(gl.minimum(inner, stop) - band + _KEYS - 1, 0) // _KEYS
    outers = gl.maximum(stop - outer + _KEYS - 1, 0) // _KEYS
    nears = gl.maximum(leads + outers, 1)  # one, of no key, where the part has no query
    fars = gl.maximum(some - plain + _KEYS - 1, 0) // _KEYS
    masked = nears + fars + rests
    steps = masked + inners + gl.load(listed)
    plan = (
        leads, nears, fars, band, inner, outer, low, end, stop, plain, some, gl.load(listed + 4),
    )  # fmt: skip
    rest += slot * most_rest
    whole += slot * most_whole
    blocks += ((head // SHARED).to(gl.int64) * many + tile) * width
    shift = q0 - begins
    sink = 0.0
    if sinks is not None:
        sink = gl.load(sinks + head).to(gl.float32) * _LOG2E
    SINKS: gl.constexpr = sinks is not None
    q_s = gl.allocate_shared_memory(q_d.dtype, [2, _HALF, DIM], q_d.layout)
    k_s = gl.allocate_shared_memory(k_d.dtype, [STAGES, _KEYS, DIM], k_d.layout)
    v_s = gl.allocate_shared_memory(v_d.dtype, [STAGES, _KEYS, DIM], v_d.layout)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bar, count=1)
    for n in gl.static_range(STAGES):
        mbarrier.init(k_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(k_free.index(n), count=2)
        mbarrier.init(v_free.index(n), count=2)
    fence_async_shared()
    shared = (k_s, v_s, k_full, k_free, v_full, v_free)
    out += head * DIM
    given = (q_s, q_bar, masked, steps, scale, sink, out, out_t, first, here, stop, shift)
    near_k = k0 - low + kv_head * k_row
    near_v = k0 - low + kv_head * v_row
    gl.warp_specialize(
        [
            (_compute, (
                shared, plan, rest, at, blocks, window, given, 0, SINKS, TILE, DIM, STAGES,
            )),
            (_compute, (
                shared, plan, rest, at, blocks, window, given, 1, SINKS, TILE, DIM, STAGES,
            )),
            (_copy, (
                q_d, k_d, v_d, far_k_d, far_v_d, q_s, q_bar, shared, plan, rest, whole, masked,
                inners, steps, first + shift + head * q_row, head * q_col, near_k,
                kv_head * k_col, near_v, kv_head * v_col, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
