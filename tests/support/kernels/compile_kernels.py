"""Compiles every kernel for the named compute capabilities without a device; run by test_compile.

Each op is called once on CPU tensors while launches are recorded instead of run; what was recorded
is compiled with the specialisation that a launch would get. Prints a line for each launch.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvpolicy.kernels import (
    _launch,
    antidiagonal,
    arena_write,
    attention_mass,
    cache_write,
    compact,
    expected_attention,
    keep_best,
    key_dots,
    keys_at,
    lag_spreads,
    norms,
    page_io,
    page_minmax,
    page_select,
    paged_decode,
    projected_norms,
    prompt_write,
    redundancy,
    redundancy_scores,
    selected_prefill,
    sparse_prefill,
    window_scores,
    write_gate,
    write_number,
)
from kvpolicy.kernels import ring as ring_ops
from kvpolicy.kernels.prefill_gather import Rectangles
from kvpolicy.ops import Arenas, Heads, Numbers, Pairs, Ring, Segments, TileReads
from tests.support.kernels.pool import make_pool

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # KB that one program may use
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []


def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    names = [p.name for p in self.params]
    bound = dict(zip(names, args, strict=False))
    bound |= {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    launches.append((self, bound, kwargs))


def source_of(kernel: Any, bound: dict[str, Any]) -> ASTSource:
    """What one recorded launch compiles."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, special: bool, path: tuple[int, ...]) -> Any:
        """The type of an argument, as a launch would specialise it."""
        if isinstance(value, tuple):
            return tuple(kind(x, special, (*path, place)) for place, x in enumerate(value))
        if value is None or (special and type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, TensorDescriptor):
            element = TYPES[value.base.dtype].removeprefix("*")
            return f"tensordesc<{element}{list(value.block_shape)}>"
        if isinstance(value, GluonDescriptor):
            element = TYPES[value.base.dtype].removeprefix("*")
            return f"tensordesc<{element}{list(value.block_shape)},{value.layout!r}>"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    for index, parameter in enumerate(kernel.params):
        value, name = bound[parameter.name], parameter.name
        if parameter.is_constexpr:
            signature[name], constants[index,] = "constexpr", value
        else:
            signature[name] = kind(value, not parameter.do_not_specialize, (index,))
    kind_of_source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return kind_of_source(kernel, signature, constants, attributes)


def translate(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> None:
    """What a compiler does first: Triton's IR of a kernel, verified. The rest takes far longer."""
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    known = backend.parse_options({**options, **source.parse_options()})
    functions = backend.get_codegen_implementation(known)
    source.make_ir(target, known, functions, backend.get_module_map(), context)


def call_all(dim: int, page: int, dtype: torch.dtype, dim_v: int | None = None) -> None:
    """Calls every op once, as a model with 8 KV heads and 4 query heads each would.

    Attention is called again with a softcap, sinks and a chunk.
    """
    heads, group, slots, window, tokens = 8, 4, 288, 256, 320
    dim_v = dim if dim_v is None else dim_v
    pages = make_pool(4, page, dim, dtype, slab_pages=4, dim_v=dim_v, width=2 * dim).pages
    table = torch.zeros(1, heads, 32, dtype=torch.int32)
    counts = torch.full((1, heads), 5, dtype=torch.int32)
    stored = Heads(table, counts)
    recent = torch.zeros(1, heads, slots, dim, dtype=dtype)
    flags = torch.zeros(1, heads, slots, dtype=torch.uint8)
    ring = Ring(recent, recent.new_zeros(1, heads, slots, dim_v), flags)
    query = torch.zeros(1, heads * group, dim, dtype=dtype)
    new, new_v = (torch.zeros(1, heads, d, dtype=dtype) for d in (dim, dim_v))
    lengths, active = torch.full((1,), 400), torch.ones(1, dtype=torch.bool)
    cache_write.decode_write(
        pages, stored, ring, new, new_v, flags[:, :, 0].contiguous(), lengths, active, window,
        minmax=True, bits=2, query=query,
        queries=torch.zeros(1, heads * group, 64, dim, dtype=dtype),
    )  # fmt: skip
    one = torch.zeros(1, dtype=torch.int32)
    for spare in ((), (table[0], one)):
        arena_write.arena_write(
            pages, stored, ring, Arenas(table[0], one, one, lengths, 256, *spare), new, new_v,
            flags[:, :, 0], one, lengths, active, window, minmax=True,
        )  # fmt: skip
    decoded = query, pages, stored, ring, lengths, active, window, 0.1
    for selected in (None, torch.zeros(1, heads, 256, dtype=torch.int32)):
        paged_decode.paged_decode(*decoded, selected)
    paged_decode.paged_decode(*decoded, rows=one)
    wide = torch.zeros(1, heads, 10_000, dtype=torch.int32)  # chosen by groups
    for how, ids in (("max", wide), ("each", table)):
        page_select.quest_select(pages, Heads(ids, counts), query, 240, how, 1, 1)
    key, value = (torch.zeros(heads, tokens, d, dtype=dtype) for d in (dim, dim_v))
    dest = torch.zeros(heads, tokens, dtype=torch.int32)
    cache_write.append(pages, table, key, value, dest, dest, dest[0])
    ids = table[0, 0]
    page_io.read_pages(pages, ids)
    page_io.read_meta(pages, ids)
    compact.read_tokens(pages, table, dest[None])
    rows = torch.zeros(heads, dtype=torch.int64)
    compact.move_kept(pages, table[0], table[0], dest[0].bool(), rows, rows.int())
    for length, kind in ((100_000, torch.float32), (8192, torch.float64), (4000, dtype)):
        score = torch.zeros(heads, length, dtype=kind)
        keep_best.keep_best(score, score > 0, rows)
    for kind in (torch.int32, torch.int64):
        page_io.copy_pages(pages, ids.to(kind), ids.to(kind))
    page_io.write_summary(pages, ids, page_io.read_summary(pages, ids))
    page_minmax.write_minmax(pages, stored, counts, 2)
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    segments = Segments((0, tokens), (0, tokens), (0,), bounds, bounds, bounds[:1])
    tile = sparse_prefill.AFTER if dim <= 128 and dtype != torch.float32 else None
    rectangles = Rectangles(lambda q, *_: (q, q[..., 0].T.float()), average=0, work=0, tile=tile)
    later = segments._replace(start=(100,), cu_k=(0, tokens + 100))
    for call in (segments, later):
        ring_ops.advance_ring(ring, key, value, dest.byte(), call, undo=call is later)
    after, fresh, ranks = prompt_write.count_leaving(dest.byte(), counts, segments, window, page)
    long = torch.zeros(heads, 20_000, dtype=torch.uint8)
    apart = segments._replace(cu_q=(0, 20_000), cu_k=(0, 20_000))
    prompt_write.count_leaving(long, counts, apart, window, page)
    prompt_write.write_leaving(
        pages, stored, key, value, dest.byte(), segments, window, after, fresh, ranks
    )
    for found in (None, rectangles):
        sparse_prefill.choose_rectangles = lambda *_, found=found: found
        prompt = (
            torch.zeros(heads * group, tokens, dim, dtype=dtype), key, value, dest.byte(),
            segments, pages, stored, window, 0.1,
        )  # fmt: skip
        sparse_prefill.prefill_attention(*prompt)
    queries = torch.zeros(heads * group, tokens, dim, dtype=dtype)
    for size, stride, softcap in ((128, 8, None), (64, 16, 30.0)):
        placed = keys_at.keys_at(key, dest.byte(), segments, pages, stored, size)
        chosen = antidiagonal.antidiagonal_blocks(
            queries, *placed, segments, 0.1, size, stride, 0.9, softcap=softcap
        )
        sets = torch.zeros(chosen.shape[1], dtype=torch.int32)
        columns = torch.zeros(chosen.shape[0], 1, 300, dtype=torch.int32)
        more = () if softcap is None else (columns, sets)
        given = key, value, segments, pages, stored, window, 0.1, TileReads(size, chosen, *more)
        sinks = None if softcap is None else torch.zeros(heads * group, dtype=dtype)
        selected_prefill.selected_prefill(queries, *given, softcap=softcap, sinks=sinks)
    hidden = 512
    observed = torch.zeros(1, heads * group, 288, dim, dtype=dtype)
    for how, norm, count in (
        ("mean", "visible", 256), ("max", "visible", 32), ("max", "global", 300),
        ("each", "visible", 16),
    ):  # fmt: skip
        window_scores.window_scores(
            pages, stored, ring, observed, lengths, window, 0.1, observation=count,
            kernel=5, pooling="avg", group=how, normalize=norm,
        )  # fmt: skip
    for count in (64, 300):
        window_scores.window_masses(
            pages, stored, ring, observed, lengths, window, 0.1, observation=count,
            squared=count == 64,
        )  # fmt: skip
    mean = torch.zeros(1, heads * group, dim)
    for square in (None, torch.zeros(1, heads * group, dim, dim)):
        expected_attention.expected_logits(pages, stored, mean, square)
    norms.value_norms(pages, stored)
    norms.key_norms(pages, stored)
    projected = torch.zeros(heads * group, dim_v, 512, dtype=dtype)
    for weight in (projected, projected.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        projected_norms.projected_norms(pages, stored, weight)
    key_dots.key_dots(pages, stored, mean[:, ::group].contiguous(), unit=True)
    key_dots.key_dots(pages, stored, mean, mean[..., : dim // 2], Pairs(0, 1, dim // 2))
    key_dots.key_directions(pages, stored)
    for values in (False, True):
        lag_spreads.lag_spreads(
            pages, stored, ring, lengths, window, sinks=4, lag=128, values=values
        )
    redundancy.last_similar(key, rows, 0.5)
    for over in ("max", "mean"):
        redundancy_scores.redundancy_scores(
            pages, stored, ring, observed, lengths, window, 0.1, observation=8, kernel=7, mix=0.07,
            threshold=0.5, group=over, softcap=30.0 if over == "mean" else None,
        )  # fmt: skip
    numbers = Numbers(torch.zeros(1, heads, 512), torch.zeros(1, heads, slots))
    for new_number in (None, torch.zeros(1, heads)):
        write_number.write_number(numbers, counts, flags, new_number, lengths, active, window)
    accumulated = numbers, pages, stored, ring, observed, lengths, lengths, lengths, window, 0.1
    for how, over, most in (("sum", "mean", 1), ("sum", "max", 32), ("max", "sum", 257)):
        attention_mass.attention_mass(*accumulated, most=most, accumulates=how, group=over)
    for silu in (False, True):
        write_gate.write_gate(
            key, key, key[0, 0], key[0, 0], torch.zeros(heads, hidden, 2 * dim, dtype=dtype),
            torch.zeros(heads, hidden, dtype=dtype), torch.zeros(heads, hidden, dtype=dtype),
            torch.zeros(heads, dtype=dtype), silu=silu,
        )  # fmt: skip
    asked: dict[str, Any] = dict(softcap=30.0, sinks=torch.zeros(heads * group, dtype=dtype))
    paged_decode.paged_decode(*decoded, **asked, chunk=1024)
    sparse_prefill.choose_rectangles = lambda *_: None
    for chunk in (None, 300):
        sparse_prefill.prefill_attention(*prompt, **asked, chunk=chunk)
    window_scores.window_scores(
        pages, stored, ring, observed, lengths, window, 0.1, observation=256, kernel=5,
        pooling="avg", group="mean", normalize="visible", **asked,
    )  # fmt: skip
    for most in (1, 257):
        attention_mass.attention_mass(
            *accumulated, most=most, accumulates="sum", group="mean", chunk=1024, **asked
        )


def overlap(ptx: str) -> str:
    """How often code copies ahead in pieces of 16 bytes, and meets the kernels around it."""
    counts = {
        "copies": ptx.count("cp.async.cg.shared.global"),
        "in_flight": ptx.count("cp.async.wait_group \t2"),
        "waits": ptx.count("griddepcontrol.wait"),
        "triggers": ptx.count("griddepcontrol.launch_dependents"),
    }
    return " ".join(f"{name}={count}" for name, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "configuration", help="capability:head_dim:page_size:dtype; 192x128: Dv 128"
    )
    parser.add_argument("--once", action="store_true", help="the first launch of each kernel only")
    parser.add_argument("--whole", nargs="*", help="others are only translated to Triton's IR")
    parser.add_argument("--only", nargs="*", metavar="KERNEL", help="launches of these kernels")
    given = parser.parse_args()
    triton.runtime.jit.JITFunction.run = record
    cc, dim, page, dtype = given.configuration.split(":")
    _launch.capability = selected_prefill.capability = lambda device: int(cc)
    keys, _, values = dim.partition("x")
    call_all(int(keys), int(page), getattr(torch, dtype), int(values or keys))
    limit, seen = SHARED[int(cc)] * 1024, set()
    for kernel, bound, options in launches:
        name = kernel.__name__
        if (given.only and name not in given.only) or (given.once and name in seen):
            continue
        seen.add(name)
        source, target = source_of(kernel, bound), GPUTarget("cuda", int(cc), 32)
        if given.whole is not None and name not in given.whole:
            translate(source, target, options)
            print(name, flush=True)
            continue
        compiled = triton.compile(source, target=target, options=options)
        shared = compiled.metadata.shared
        print(f"{name} shared={shared} {overlap(compiled.asm['ptx'])}", flush=True)
        if shared > limit:
            sys.exit(f"{given.configuration} {name}: {shared} bytes shared, {limit} there")


if __name__ == "__main__":
    main()
