"""The best tokens of each head, without a sort: a search for the lowest score that stays.

Scores become integers that rise from the best to the worst. The border is found 8 bits at a time:
of the scores that begin as it does, count how often each next digit occurs. A long head is spread
over many programs; counts are sums of integers, and nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, on, power_of_two

_CHUNK = 4096  # scores that one program looks at
_FEW = 1024  # or so many; there are no other sizes, each of which would have to be compiled
_CHUNKS = 16  # the least that `_mark` is compiled for


def keep_best(scores: Tensor, valid: Tensor, amount: Tensor) -> Tensor:
    """Marks the `amount` `[...]` best valid tokens of each head `[..., N]`; see `Ops.keep_best`."""
    keep = torch.empty(valid.shape, dtype=torch.bool, device=valid.device)
    if not keep.numel():
        return keep
    length = valid.shape[-1]
    heads, chunks = keep.numel() // length, cdiv(length, _CHUNK)
    bits = 64 if scores.dtype == torch.float64 else 32
    scores, amount = scores.contiguous(), amount.contiguous()
    valid, out = valid.contiguous().view(torch.uint8), keep.view(torch.uint8)
    with on(scores):
        if chunks == 1:
            block = _FEW if length <= _FEW else _CHUNK
            _mark_whole[heads,](
                scores, valid, amount, out, length,
                BITS=bits, BLOCK=block, num_warps=8 if block > 1024 else 4,
            )  # fmt: skip
            return keep
        counts = torch.zeros(heads, bits // 8, 256, dtype=torch.int32, device=valid.device)
        equal = torch.empty(heads, chunks, dtype=torch.int32, device=valid.device)
        sizes = dict(BITS=bits, CHUNK=_CHUNK, num_warps=8)
        for digit in range(bits // 8):
            _count_digits[chunks, heads](
                scores, valid, amount, counts, length, DIGIT=digit, **sizes
            )
        _count_equal[chunks, heads](scores, valid, amount, counts, equal, length, chunks, **sizes)
        _mark[chunks, heads](
            scores, valid, amount, counts, equal, out, length, chunks,
            CHUNKS=max(power_of_two(chunks), _CHUNKS), **sizes,
        )  # fmt: skip
    return keep


@triton.jit
def _ranks(scores, valid, n, length, BITS: tl.constexpr):
    """Unsigned integers that fall as the scores of tokens n rise, and which tokens are valid."""
    there = n < length
    score = tl.load(scores + n, mask=there, other=0.0)  # [N]
    # Adding zero makes -0 and 0 equal, as they are as scores.
    if BITS == 64:
        bits = (score + 0.0).to(tl.uint64, bitcast=True)
        rank = tl.where(bits >> 63 == 1, bits, bits ^ 0x7FFFFFFFFFFFFFFF)
    else:
        bits = (score.to(tl.float32) + 0.0).to(tl.uint32, bitcast=True)
        rank = tl.where(bits >> 31 == 1, bits, bits ^ 0x7FFFFFFF)
    return rank, tl.load(valid + n, mask=there, other=0) != 0


@triton.jit
def _digit(found, bins, left):
    """The border's digit, and how many of the tokens with it stay of the `left` that shall.

    Where there are fewer tokens than that it is the last digit.
    """
    own = tl.minimum(tl.sum((tl.cumsum(found, 0) < left).to(tl.int32), 0), 255)
    return own, left - tl.sum(tl.where(bins < own, found, 0), 0)


@triton.jit(do_not_specialize=["length"])
def _mark_whole(
    scores, valid, amount, keep, length, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Marks the best tokens of a head that one program holds."""
    head = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)
    rank, open = _ranks(scores + head * length, valid + head * length, n, length, BITS)
    left = tl.minimum(tl.load(amount + head), length).to(tl.int32)
    stays = n < 0
    for digit in tl.static_range(BITS // 8):
        value = ((rank >> (BITS - 8 - 8 * digit)) & 255).to(tl.int32)
        own, left = _digit(tl.histogram(value, 256, mask=open), bins, left)
        stays = stays | (open & (value < own))
        open = open & (value == own)
    tie = open.to(tl.int32)
    later = tl.sum(tie, 0) - tl.cumsum(tie, 0) + tie  # ties from each token on
    stays = stays | (open & (later <= left))
    tl.store(keep + head * length + n, stays.to(tl.uint8), mask=n < length)


@triton.jit
def _border(counts, amount, length, DIGITS: tl.constexpr, BITS: tl.constexpr):
    """The first digits of the border, and how many of the tokens that have them stay."""
    bins = tl.arange(0, 256)
    left = tl.minimum(tl.load(amount), length).to(tl.int32)
    border = tl.full([], 0, tl.uint64 if BITS == 64 else tl.uint32)
    for digit in tl.static_range(DIGITS):
        own, left = _digit(tl.load(counts + digit * 256 + bins), bins, left)
        border = (border << 8) | own.to(border.dtype)
    return border, left


@triton.jit(do_not_specialize=["length"])
def _count_digits(
    scores, valid, amount, counts, length,
    DIGIT: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Counts the digits number DIGIT of a chunk's ranks that begin with the digits before."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    counts += head * (BITS // 8 * 256)
    rank, here = _ranks(scores + head * length, valid + head * length, n, length, BITS)
    if DIGIT > 0:
        border, left = _border(counts, amount + head, length, DIGIT, BITS)
        here = here & (rank >> (BITS - 8 * DIGIT) == border)
    value = ((rank >> (BITS - 8 - 8 * DIGIT)) & 255).to(tl.int32)
    found = tl.histogram(value, 256, mask=here)
    tl.atomic_add(counts + DIGIT * 256 + tl.arange(0, 256), found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=["length", "chunks"])
def _count_equal(
    scores, valid, amount, counts, equal, length, chunks, BITS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """How many tokens of a chunk have the border's score."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    rank, here = _ranks(scores + head * length, valid + head * length, n, length, BITS)
    border, left = _border(
        counts + head * (BITS // 8 * 256), amount + head, length, BITS // 8, BITS
    )  # fmt: skip
    tie = here & (rank == border)
    tl.store(equal + head * chunks + tl.program_id(0), tl.sum(tie.to(tl.int32), 0))


@triton.jit(do_not_specialize=["length", "chunks"])
def _mark(
    scores, valid, amount, counts, equal, keep, length, chunks,
    CHUNKS: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Marks a chunk's tokens above the border and the last ones that equal it."""
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    rank, here = _ranks(scores + head * length, valid + head * length, n, length, BITS)
    border, left = _border(
        counts + head * (BITS // 8 * 256), amount + head, length, BITS // 8, BITS
    )  # fmt: skip
    same = here & (rank == border)
    tie = same.to(tl.int32)
    c = tl.arange(0, CHUNKS)
    after = (c > tl.program_id(0)) & (c < chunks)
    later = tl.sum(tl.load(equal + head * chunks + c, mask=after, other=0), 0)
    later += tl.sum(tie, 0) - tl.cumsum(tie, 0) + tie  # ties from each token on
    stays = (here & (rank < border)) | (same & (later <= left))
    tl.store(keep + head * length + n, stays.to(tl.uint8), mask=n < length)
