"""What decoders ask of attention, timed: the same kernels, sizes and tokens with it and without."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from ..ops import ADMITTED, Ring
from ..spec import LayerSizes
from .context import Bench, Case, check
from .data import ragged, segments, stored, tokens_of
from .rows import Goal, Row
from .timing import captured_ms, median_ms, sets_for

PAGE = 16
MOST = 1.1  # times a decode step's kernels without what the decoder asks
LONGEST = 16384  # tokens of a prompt


@attrs.frozen(kw_only=True)
class Shape:
    """An attention layer: sizes (the window is 256 unless given), and tokens it has in pages."""

    sizes: LayerSizes
    sinks: bool = False
    mean: int = 25_000

    @property
    def window(self) -> int:
        return self.sizes.window or 256


def _shape(heads: int, kv_heads: int, dim: int, *, sinks: bool = False, mean: int = 25_000,
           **sizes: Any) -> Shape:  # fmt: skip
    own = LayerSizes(heads=heads, kv_heads=kv_heads, head_dim=dim, **sizes)
    return Shape(sizes=own, sinks=sinks, mean=mean)


SHAPES = {
    "gpt-oss full": _shape(64, 8, 64, sinks=True),
    "gpt-oss sliding": _shape(64, 8, 64, sinks=True, window=128, mean=0),
    "Gemma 2 full": _shape(16, 8, 256, softcap=50.0),
    "Gemma 2 sliding": _shape(16, 8, 256, softcap=50.0, window=4096, mean=0),
    "Llama 4 chunked": _shape(40, 8, 128, window=8192, chunk=8192, mean=0),
    "MiMo 192 and 128": _shape(64, 4, 192, sinks=True, value_dim=128),
    "D=256": _shape(16, 4, 256),
    "D=512": _shape(16, 2, 512),
    "D=512 softcap": _shape(16, 2, 512, softcap=30.0),
}


class Decoding:
    """Buffer sets of a decoding layer of some shape."""

    def __init__(self, bench: Bench, shape: Shape) -> None:
        sizes = shape.sizes
        self.sizes, self.window, self.mean = sizes, shape.window, shape.mean
        if bench.quick:  # as many heads, channels and tokens as the interpreter likes
            self.window, self.mean = min(self.window, 16), min(shape.mean, 64)
            chunk = None if sizes.chunk is None else self.window
            small = attrs.evolve(sizes, heads=4, kv_heads=2, window=self.window, chunk=chunk)
            self.sizes = sizes = small
        held = [n or 1 for n in ragged(self.mean, sizes.kv_heads)]
        self.held = held if self.mean else [0] * sizes.kv_heads
        width = sizes.head_dim + sizes.value_dim
        self.bytes = 2 * width * (sum(self.held) + sizes.kv_heads * self.window)
        count = bench.pick(sets_for(self.bytes), 2)
        self.pool, self.tables = stored(
            bench, [held] * count, PAGE, sizes.head_dim, dim_v=sizes.value_dim
        )
        if not self.mean:
            for _, counts in self.tables:
                counts.zero_()
        slots = self.window + 32
        shape_kv = 1, sizes.kv_heads, slots
        flags = torch.zeros(shape_kv, dtype=torch.uint8, device=bench.device)
        dims = sizes.head_dim, sizes.value_dim
        self.rings = [
            Ring(bench.randn(*shape_kv, dims[0]), bench.randn(*shape_kv, dims[1]), flags)
            for _ in self.tables
        ]
        self.queries = [bench.randn(1, sizes.heads, sizes.head_dim) for _ in self.tables]
        # The last token of a chunk sees all of it.
        self.now = torch.tensor([4 * self.mean + 8 * self.window - 1], device=bench.device)
        self.active = torch.ones(1, dtype=torch.bool, device=bench.device)
        self.sinks = bench.randn(sizes.heads) + 4 if shape.sinks else None

    @property
    def asked(self) -> dict[str, Any]:
        return {"softcap": self.sizes.softcap, "sinks": self.sinks, "chunk": self.sizes.chunk}

    def attend(self, index: int, asked: dict[str, Any]) -> Tensor:
        from ..kernels.paged_decode import paged_decode

        return paged_decode(
            self.queries[index], self.pool.pages, self.tables[index], self.rings[index], self.now,
            self.active, self.window, self.sizes.scale, **asked,
        )  # fmt: skip

    def check(self, name: str) -> None:
        """Compares the shortest and the longest head with float64."""
        out, (table, _), ring = self.attend(0, self.asked)[0], self.tables[0], self.rings[0]
        group = self.sizes.heads // self.sizes.kv_heads
        back = (int(self.now) - torch.arange(ring.slots, device=out.device)) % ring.slots
        for head in (0, self.sizes.kv_heads - 1):
            used = -(-self.held[head] // PAGE)
            k, v, _ = tokens_of(self.pool, table[0, head, :used], self.held[head])
            k, v = (
                torch.cat([x, r[0, head][back < self.window]]).double()
                for x, r in zip((k, v), ring, strict=False)
            )
            rows = slice(head * group, (head + 1) * group)
            q, sinks = self.queries[0][0, rows].double(), self.sinks
            weights = _weights(q @ k.T, self.sizes, None if sinks is None else sinks[rows, None])
            check(f"{name} head {head}", out[rows], weights @ v)


def _weights(
    product: Tensor, sizes: LayerSizes, sinks: Tensor | None, hidden: Tensor | None = None
) -> Tensor:
    """Attention weights of q.k `[..., N]`, 0 where `hidden`; `sinks` `[..., 1]` or None."""
    logits = product * sizes.scale
    if sizes.softcap is not None:
        logits = sizes.softcap * torch.tanh(logits / sizes.softcap)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    if sinks is None:
        return logits.softmax(-1)
    return torch.cat([logits, sinks.to(logits)], -1).softmax(-1)[..., :-1]


def decode(bench: Bench, case: str, shape: Shape) -> Iterator[Row]:
    """A decoded token, captured, with what the decoder asks and without."""
    layer = Decoding(bench, shape)
    layer.check(case)
    sets = range(len(layer.tables))

    def time(asked: dict[str, Any]) -> float:
        return captured_ms(
            [functools.partial(layer.attend, index, asked) for index in sets], bench.device
        )

    plain, ms = time({}), time(layer.asked)
    asked = any(x is not None for x in layer.asked.values())
    yield Row(
        group="decoders", name=case, value=1e3 * ms, unit="us", rate=layer.bytes / ms / 1e9,
        rate_unit="TB/s", floor=1e3 * bench.floor_ms(moved=layer.bytes),
        goals=(Goal(what="of plain", wanted=MOST, got=ms / plain),) if asked else (),
        shape=_text(layer.sizes, f"{sum(layer.held)} stored, window {layer.window}"),
        baseline=f"{ms / plain:.3f}x without, {1e3 * plain:.4g} us",
        note=f"captured, {len(sets)} buffer sets",
    )  # fmt: skip


def prompt(bench: Bench, case: str, shape: Shape) -> Iterator[Row]:
    """A whole prompt, a tenth of it admitted, with what the decoder asks and without."""
    from ..kernels.cache_write import append
    from ..kernels.sparse_prefill import prefill_attention

    sizes, window = shape.sizes, bench.pick(shape.window, 16)
    tokens, rate = bench.pick(LONGEST, 48), 0.1 if shape.mean else 0.0
    if bench.quick:
        chunk = None if sizes.chunk is None else window
        sizes = attrs.evolve(sizes, heads=4, kv_heads=2, window=window, chunk=chunk)
    query = bench.randn(tokens, sizes.heads, sizes.head_dim).transpose(0, 1)
    dims = sizes.head_dim, sizes.value_dim
    key, value = (bench.randn(tokens, sizes.kv_heads, d).transpose(0, 1) for d in dims)
    admitted = torch.rand(key.shape[:2], device=bench.device) < rate
    gone = admitted & (torch.arange(tokens, device=bench.device) < tokens - window)
    pool, [heads] = stored(bench, [[n or 1 for n in gone.sum(1).tolist()]], PAGE, sizes.head_dim,
                           dim_v=sizes.value_dim)  # fmt: skip
    heads.counts.copy_(gone.sum(1))
    at = torch.arange(tokens, dtype=torch.int32, device=bench.device)
    dest = torch.where(gone, gone.cumsum(1) - 1, -1).int()
    append(
        pool.pages, heads.table, key, value, at.expand_as(dest), dest, torch.zeros_like(at)
    )  # fmt: skip
    sinks = bench.randn(sizes.heads) + 4 if shape.sinks else None
    more = {"softcap": sizes.softcap, "sinks": sinks, "chunk": sizes.chunk}
    flags = admitted.to(torch.uint8) * ADMITTED
    given = query, key, value, flags, segments(bench, 0, tokens, tokens)

    def call(asked: dict[str, Any]) -> Tensor:
        rest = pool.pages, heads, window, sizes.scale
        return prefill_attention(*given, *rest, **asked)

    out, i = call(more), at[-16:, None]
    seen = (i - at < window) | admitted[:, None]
    if sizes.chunk is not None:
        seen &= i // sizes.chunk == at // sizes.chunk
    for head in (0, sizes.heads - 1):
        own = head * sizes.kv_heads // sizes.heads
        product = query[head, -16:].double() @ key[own].double().T
        sink = None if sinks is None else sinks[head].expand(16, 1)
        weights = _weights(product, sizes, sink, ~(seen[own] & (at <= i)))
        check(f"{case} head {head}", out[head, -16:], weights @ value[own].double())
    plain, ms = (median_ms([functools.partial(call, x)], bench.device) for x in ({}, more))
    reach = at if sizes.chunk is None else at % sizes.chunk
    pairs = int((reach + 1).clamp(max=window).sum()) * sizes.heads
    sees = (tokens - at - window).clamp(min=0)
    pairs += int((admitted * sees).sum()) * (sizes.heads // sizes.kv_heads)
    yield Row(
        group="decoders", name=case, value=ms, floor=bench.floor_ms(2.0 * sum(dims) * pairs),
        rate=2.0 * sum(dims) * pairs / ms / 1e9, rate_unit="TFLOP/s",
        shape=_text(sizes, f"{tokens} tokens, window {window}, {rate:.0%} admitted"),
        baseline=f"{ms / plain:.3f}x without, {plain:.4g} ms",
    )  # fmt: skip


def _text(sizes: LayerSizes, rest: str) -> str:
    dims = "/".join(map(str, dict.fromkeys((sizes.head_dim, sizes.value_dim))))
    return f"{sizes.heads}/{sizes.kv_heads} heads, D={dims}, {rest}"


def cases(bench: Bench) -> list[Case]:
    found = []
    for name, shape in SHAPES.items():
        for run, text in ((decode, name), (prompt, f"{name}, prompt")):
            call = functools.partial(run, case=text, shape=shape)
            found.append(Case(group="decoders", name=text, run=call, seconds=8, rank=60))
    return found
