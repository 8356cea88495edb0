"""Attention of a prompt: the sparse kernel, the dense ones, and everything admitted."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from ..ops import ADMITTED, Heads, Pages, Segments
from ..store.pool import PagePool
from .context import Bench, Case, check
from .data import segments, stored
from .dense import HEADS, KV_HEADS, dense_flops, dense_ms
from .rows import Goal, Row
from .timing import median_ms

PAGE = 16


@attrs.frozen(kw_only=True, eq=False)
class Problem:
    """Queries from `start` to `tokens`, with the tokens that left the window stored in pages."""

    tokens: int
    start: int
    window: int
    query: Tensor  # [Hq, Tq, D]
    key: Tensor  # [Hkv, tokens, D]
    value: Tensor
    admitted: Tensor  # bool [Hkv, tokens]
    recent: tuple[Tensor, Tensor, Tensor]  # keys, values and flags from the ring's first token on
    segments: Segments
    pool: PagePool  # owns the extents behind `pages`
    heads: Heads

    @property
    def pages(self) -> Pages:
        return self.pool.pages

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    def pairs(self) -> int:
        """Visible (query, key) pairs of all query heads."""
        group = self.query.shape[0] // self.key.shape[0]
        at = torch.arange(self.start, self.tokens)
        near = int((at + 1).clamp(max=self.window).sum()) * self.query.shape[0]
        j = torch.arange(self.tokens, device=self.admitted.device)
        sees = (self.tokens - (j + self.window).clamp(min=self.start)).clamp(min=0)
        return near + group * int((self.admitted * sees).sum())

    def check(self, name: str, out: Tensor) -> None:
        """Compares rows at the beginning, in the middle and at the end with float64."""
        if not bool(torch.isfinite(out).all()):
            check(name, out, torch.zeros_like(out))
        count, group = out.shape[1], out.shape[0] // self.key.shape[0]
        size = min(32, count)
        for first in {0, (count - size) // 2, count - size}:
            i = torch.arange(first, first + size, device=out.device)[:, None] + self.start
            j = torch.arange(int(i[-1]) + 1, device=out.device)
            for head in (0, out.shape[0] - 1):
                row = self.admitted[head // group, : j.numel()]
                seen = (j <= i) & ((i - j < self.window) | row)
                k, v = (x[head // group, : j.numel()].double() for x in (self.key, self.value))
                scores = self.query[head, first : first + size].double() @ k.T * self.scale
                exact = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
                check(f"{name} head {head} query {first}", out[head, first : first + size], exact)


def problem(bench: Bench, tokens: int, rates: list[float], dim: int, start: int = 0) -> Problem:
    """Random tokens of one sequence; head h admits a fraction `rates[h]` of them."""
    from ..kernels import cache_write

    kv_heads, window = len(rates), bench.pick(256, 16)
    # As they leave a projection: [T, H, D], seen as [H, T, D].
    query = bench.randn(tokens - start, bench.pick(HEADS, 4), dim).transpose(0, 1)
    key, value = (bench.randn(tokens, kv_heads, dim).transpose(0, 1) for _ in range(2))
    rate = torch.tensor(rates, device=bench.device)[:, None]
    admitted = torch.rand(kv_heads, tokens, device=bench.device) < rate
    gone = admitted & (torch.arange(tokens, device=bench.device) < tokens - window)
    held = gone.sum(1).tolist()
    pool, [heads] = stored(bench, [[max(n, 1) for n in held]], PAGE, dim)
    heads.counts.copy_(gone.sum(1))
    dest = torch.where(gone, gone.cumsum(1) - 1, -1).int()
    at = torch.arange(tokens, dtype=torch.int32, device=bench.device)
    cache_write.append(
        pool.pages, heads.table, key, value, at.expand(kv_heads, -1), dest, torch.zeros_like(at)
    )
    first = max(start - window, 0)
    flags = admitted.to(torch.uint8) * ADMITTED
    recent = [x[:, first:].contiguous() if first else x for x in (key, value, flags)]
    return Problem(
        tokens=tokens, start=start, window=window, query=query, key=key, value=value,
        admitted=admitted, recent=(recent[0], recent[1], recent[2]), pool=pool, heads=heads,
        segments=segments(bench, start, tokens - start, tokens - first),
    )  # fmt: skip


def _row(bench: Bench, case: str, p: Problem, ms: float, **more: Any) -> Row:
    heads, queries, dim = p.query.shape
    flops = 4.0 * dim * p.pairs()
    held = int(p.heads.counts.sum()) + p.recent[0].shape[0] * p.recent[0].shape[1]
    moved = 2.0 * (2 * p.query.numel() + 2 * held * dim)
    return Row(
        group="prefill", name=case, value=ms, rate=flops / ms / 1e9, rate_unit="TFLOP/s",
        shape=f"{queries} of {p.tokens} tokens, {heads}/{p.key.shape[0]} heads, D={dim}",
        floor=bench.floor_ms(flops, moved), **more,
    )  # fmt: skip


def _gather(p: Problem, rectangles: Any) -> Any:
    from ..kernels.sparse_prefill import gather, tile_of

    group, tile = p.query.shape[0] // p.key.shape[0], tile_of(p.query)
    return gather(p.segments, p.pages, p.heads, p.window, tile, group, rectangles)


def _attend(p: Problem, far: Any) -> Tensor:
    from ..kernels.sparse_prefill import attend, tile_of

    more = p.window, p.scale, tile_of(p.query)
    return attend(p.query, *p.recent, p.segments, p.heads.counts, far, *more)


def _ways(p: Problem) -> dict[str, Any]:
    """Rectangles of each way that is present, the one that the library takes first."""
    from ..kernels import sparse_prefill as kernel

    own = kernel.choose_rectangles(p.query)
    if own is None:
        return {"Triton alone": None}
    ways = {"FA3 rectangles": own._replace(average=0, work=0), "Triton alone": None}
    far = _gather(p, own)
    return ways if far is not None and far.plan is not None else dict(reversed(ways.items()))


def sparse(
    bench: Bench, case: str, tokens: int, rates: list[float], dim: int, wanted: float
) -> Iterator[Row]:
    """Attention to gathered rows by every way present; the gather is timed apart."""
    p = problem(bench, tokens, rates, dim)
    dense = dense_ms(bench, tokens, dim)
    for other, (way, rectangles) in enumerate(_ways(p).items()):
        gather = functools.partial(_gather, p, rectangles)
        attend = functools.partial(_attend, p, gather())
        p.check(f"{case}, {way}", attend())
        ms = median_ms([attend], bench.device)
        if other:
            yield _row(bench, f"{case}: {way}", p, ms, note="not what the library takes here")
            continue
        goals = _goals(bench, case, p, ms, wanted, dense)
        against = ", ".join(f"{t / ms:.2f}x {name} {t:.4g} ms" for name, t in dense.items())
        yield _row(bench, case, p, ms, goals=goals, baseline=against, note=way)
        moved = 2.0 * 2 * 2 * int(p.heads.counts.sum()) * dim
        took = median_ms([gather], bench.device)
        yield Row(
            group="prefill", name=f"{case}: gather", value=took, rate=moved / took / 1e9,
            rate_unit="TB/s", floor=bench.floor_ms(moved=moved), note="inside end-to-end times",
        )  # fmt: skip


def _goals(
    bench: Bench, case: str, p: Problem, ms: float, wanted: float, dense: dict[str, float]
) -> tuple[Goal, ...]:
    tokens, dim = p.query.shape[1:]
    rate = 4.0 * dim * p.pairs() / ms / 1e9
    goals = [Goal(what="TFLOP/s", wanted=wanted, got=rate, at_most=False)] if wanted else []
    if dim == bench.pick(64, 16) and "FA3" in dense:
        own = dense_flops(bench, tokens, dim) / dense["FA3"] / 1e9
        goals.append(Goal(what="TFLOP/s of FA3", wanted=0.85, got=rate / own, at_most=False))
    if case == "131K 25%":
        for name, times in {"FA3": 3.5, "cuDNN": 4.2, "FA2": 7.0}.items():
            if name in dense:
                got = dense[name] / ms
                goals.append(Goal(what=f"x {name}", wanted=times, got=got, at_most=False))
    return tuple(goals)


def last_chunk(bench: Bench, case: str) -> Iterator[Row]:
    """The last chunk of a long prompt, with the gather of its page prefix."""
    from ..kernels import sparse_prefill as kernel

    tokens, queries = bench.pick(131072, 160), bench.pick(8192, 64)
    p = problem(
        bench, tokens, [0.25] * bench.pick(KV_HEADS, 2), bench.pick(128, 32), tokens - queries
    )
    whole = lambda: kernel.prefill_attention(  # noqa: E731
        p.query, *p.recent, p.segments, p.pages, p.heads, p.window, p.scale
    )
    for other, (way, rectangles) in enumerate(_ways(p).items()):
        parts = lambda rectangles=rectangles: _attend(p, _gather(p, rectangles))  # noqa: E731
        call = parts if other else whole
        p.check(f"{case}, {way}", call())
        ms = median_ms([call], bench.device)
        rate = 4.0 * p.query.shape[2] * p.pairs() / ms / 1e9
        goals = () if other else (Goal(what="TFLOP/s", wanted=560, got=rate, at_most=False),)
        name = f"{case}: {way}" if other else case
        yield _row(bench, name, p, ms, goals=goals, note=f"{way}, gather included")


def everything(bench: Bench, case: str) -> Iterator[Row]:
    """Everything admitted: the call that the cache makes, against the dense kernels alone."""
    from ..kernels import dense_prefill as kernel

    tokens, dim = bench.pick(131072, 96), bench.pick(128, 32)
    p = problem(bench, tokens, [1.0] * bench.pick(KV_HEADS, 2), dim)

    def call() -> Tensor:
        return kernel.dense_prefill(
            p.query, *p.recent[:2], p.segments, p.pages, p.heads.table, p.scale
        )

    p.check(case, call())
    ms = median_ms([call], bench.device)
    dense = dense_ms(bench, tokens, dim)
    name, best = min(dense.items(), key=lambda item: item[1])
    goal = Goal(what=f"rate of {name}", wanted=0.95, got=best / ms, at_most=False)
    yield _row(bench, case, p, ms, goals=(goal,), baseline=f"{best / ms:.3f}x {name} {best:.4g} ms")


def cases(bench: Bench) -> list[Case]:
    long, short = bench.pick(131072, 160), bench.pick(32768, 96)
    dim, kv_heads = bench.pick(128, 32), bench.pick(KV_HEADS, 2)
    full = kv_heads // 4 or 1
    duo = [1.0] * full + [0.02] * (kv_heads - full)
    plan: list[tuple[Any, ...]] = [
        ("131K 25%", long, [0.25] * kv_heads, dim, 600),
        ("131K 10%", long, [0.1] * kv_heads, dim, 560),
        ("32K 25%", short, [0.25] * kv_heads, dim, 540),
        ("32K 10%", short, [0.1] * kv_heads, dim, 0),
        ("Duo shape 131K", long, duo, dim, 540),
        ("head_dim 64 131K 25%", long, [0.25] * kv_heads, bench.pick(64, 16), 0),
    ]
    found = [
        Case(
            group="prefill", name=name, rank=0 if name == "131K 25%" else 40,
            run=functools.partial(sparse, case=name, tokens=n, rates=rates, dim=d, wanted=wanted),
        )
        for name, n, rates, d, wanted in plan
    ]  # fmt: skip
    chunk = "last 8K chunk of 131K 25%"
    found.insert(3, Case(group="prefill", name=chunk, run=lambda b: last_chunk(b, chunk), rank=40))
    every = "everything admitted 131K"
    found.append(Case(group="prefill", name=every, run=lambda b: everything(b, every), rank=41))
    return found
