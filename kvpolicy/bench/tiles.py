"""Attention of a prompt whose tiles choose blocks, with the choice, at forced densities."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops import Ops, TileReads, load
from .context import Bench, Case, check
from .dense import KV_HEADS
from .prefill import Problem, problem
from .rows import Goal, Row
from .timing import median_ms

DENSITIES = (0.1, 0.25, 0.5)
SLACK = 1.25


def forced(bench: Bench, heads: int, tiles: int, density: float) -> Tensor:
    """Blocks `[Hq, N, N]` of which a part is read: the first, the tile's own and random others."""
    n = torch.arange(tiles, device=bench.device)
    upto = n <= n[:, None]
    sure = ((n == 0) | (n == n[:, None])) & upto
    wanted, there = density * upto.sum() - sure.sum(), (upto & ~sure).sum()
    rate = (wanted / there).clamp(0, 1)
    chosen = torch.rand(heads, tiles, tiles, device=bench.device) < rate
    return sure | (upto & chosen)


def check_chosen(name: str, p: Problem, out: Tensor, blocks: Tensor, tile: int) -> None:
    """Compares rows in the middle and at the end with float64."""
    count, group = out.shape[1], out.shape[0] // p.key.shape[0]
    size = min(32, count)
    for first in {(count - size) // 2, count - size}:
        i = torch.arange(first, first + size, device=out.device)[:, None]
        j = torch.arange(int(i[-1]) + 1, device=out.device)
        for head in (0, out.shape[0] - 1):
            seen = (j <= i) & ((i - j < p.window) | blocks[head][i // tile, j // tile])
            k, v = (x[head // group, : j.numel()].double() for x in (p.key, p.value))
            scores = p.query[head, first : first + size].double() @ k.T * p.scale
            exact = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
            check(f"{name} head {head} query {first}", out[head, first : first + size], exact)


def _choose(ops: Ops, p: Problem, tile: int, stride: int) -> Tensor:
    keys = ops.keys_at(p.recent[0], p.recent[2], p.segments, p.pages, p.heads, tile)
    return ops.antidiagonal_blocks(p.query, *keys, p.segments, p.scale, tile, stride, 0.9)


def _attend(ops: Ops, p: Problem, reads: TileReads) -> Tensor:
    return ops.selected_prefill(
        p.query, *p.recent[:2], p.segments, p.pages, p.heads, p.window, p.scale, reads
    )


def tiles(bench: Bench, case: str, stride: int) -> Iterator[Row]:
    """The choice of blocks, then attention over a forced part of them, against the dense op."""
    tokens, dim, tile = bench.pick(131072, 64), bench.pick(128, 16), bench.pick(128, 16)
    p = problem(bench, tokens, [1.0] * bench.pick(KV_HEADS, 2), dim)
    ops = load("triton")
    heads, blocks = p.query.shape[0], -(-tokens // tile)

    def dense() -> Any:
        given = p.query, *p.recent[:2], p.segments, p.pages, p.heads.table, p.scale
        return ops.dense_prefill(*given)

    whole = bench.shared.setdefault(("dense op", tokens, dim), {})
    if not whole:
        whole["ms"] = median_ms([dense], bench.device)
    base = whole["ms"]
    choose = functools.partial(_choose, ops, p, tile, stride)
    chosen = choose()
    took = median_ms([choose], bench.device)
    # Products of groups: half of all pairs, `stride` fewer of either than tokens.
    flops = 2.0 * dim * heads * tokens * tokens / stride / 2
    part = float(chosen.sum()) / (heads * blocks * (blocks + 1) / 2)
    yield Row(
        group="tiles", name=f"{case}: choice", value=took, rate=flops / took / 1e9,
        rate_unit="TFLOP/s", floor=bench.floor_ms(flops), baseline=f"dense op {base:.4g} ms",
        note=f"random tokens: {part:.1%} of the blocks hold 90 % of the mass",
        extra={"dense_ms": base},
    )  # fmt: skip
    for density in bench.pick(DENSITIES, DENSITIES[-1:]):
        only = forced(bench, heads, blocks, density)
        call = functools.partial(_attend, ops, p, TileReads(tile, only))
        check_chosen(f"{case} {density:.0%}", p, call(), only, tile)
        ms = median_ms([call], bench.device)
        found = float(only.sum()) / (heads * blocks * (blocks + 1) / 2)
        flops = 4.0 * dim * heads * found * tokens * tokens / 2
        limit = SLACK * (density + 1 / (2 * stride))
        goal = Goal(what="of the dense op's time", wanted=limit, got=(ms + took) / base)
        yield Row(
            group="tiles", name=f"{case}, {density:.0%} of blocks", value=ms + took,
            rate=flops / ms / 1e9, rate_unit="TFLOP/s", floor=bench.floor_ms(flops),
            goals=(goal,), baseline=f"{base / (ms + took):.2f}x dense op {base:.4g} ms",
            note=f"attention {ms:.4g} ms, whose rate this is, and choice {took:.4g} ms",
            extra={"attention_ms": ms, "choice_ms": took, "density": found},
        )  # fmt: skip


def cases(bench: Bench) -> list[Case]:
    found = []
    for stride, rank in ((8, 42), (16, 43)):
        name = f"131K stride {stride}"
        run = functools.partial(tiles, case=name, stride=stride)
        found.append(Case(group="tiles", name=name, run=run, seconds=15, rank=rank))
    return found
