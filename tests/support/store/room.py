"""Small caches of interpreted kernels that take pages for prompts, and what must hold of them."""

from __future__ import annotations

import torch

from kvpolicy import CacheSpec, RandomGate
from kvpolicy.pipeline import CachePipeline
from kvpolicy.store.extents import SLAB_PAGES

LAYERS, HEADS, DIM, SIZE, CHUNK = 3, 2, 16, 2, 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def filled(rows=1, selection=None, sparsity=0.4, **sizes):
    """A cache of kernels after a prompt that is long beside `CHUNK`."""
    spec = CacheSpec(
        layers=LAYERS, heads=HEADS, kv_heads=HEADS, head_dim=DIM, page_size=SIZE, device=DEVICE,
        **sizes,
    )  # fmt: skip
    more = {} if selection is None else {"selection": selection}
    pipeline = CachePipeline(
        admission=RandomGate(sparsity=sparsity), window=3, backend="triton", **more
    )
    state = pipeline.init(spec, rows)
    list(layers(pipeline, state, 100))
    return pipeline, state, state.devices.pools[0]


def layers(pipeline, state, count, phase="prompt"):
    """Runs a call; yields after each layer with its output."""
    pipeline.begin(state, [count] * state.batch, phase)
    many = count * state.batch
    shape = (HEADS, many, DIM) if phase == "prompt" else (state.batch, HEADS, count, DIM)
    for layer in range(LAYERS):
        noise = torch.Generator().manual_seed(sum(state.lengths) + layer)
        tokens = (torch.randn(shape, generator=noise).to(DEVICE) for _ in range(3))
        yield pipeline.attend(state, layer, *tokens)
    pipeline.commit(state)


def near_a_cap():
    """Caps in bytes, each with the calls of `CHUNK` tokens after which one more fits: below the
    first also if all of it were admitted, below the second with two pages to spare as it is."""
    pipeline, state, pool = filled()
    most = LAYERS * HEADS * -(-CHUNK // SIZE)
    found, calls, before = {}, 0, pool.used
    while len(found) < 2:
        list(layers(pipeline, state, CHUNK))
        cap = -(-(pool.used + 1) // SLAB_PAGES) * SLAB_PAGES - 1  # pages beside the null page
        if before + most <= cap or cap - pool.used <= 2:
            found.setdefault(before + most <= cap, ((cap + 1) * pool.page_bytes, calls))
        calls, before = calls + 1, pool.used
    return found[True], found[False]


def check_pages(pool, *states):
    """No page is both free and held, and every token has one."""
    free = pool.free[: int(pool.top)].tolist()
    held = set()
    for layer in (x for state in states for x in state.layers):
        column = torch.arange(layer.table.shape[2], device=DEVICE)
        held |= set(layer.table[column * SIZE < layer.counts[..., None]].tolist())
    assert len(set(free)) == len(free)
    assert 0 not in held and not held & set(free)
