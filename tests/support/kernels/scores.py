"""A layer's pages and rings, and SnapKV's scores of them."""

from __future__ import annotations

import attrs
import torch

from kvpolicy import EvictionView
from kvpolicy.ops import POSITION_BITS, Heads, Pages, Ring
from tests.support.kernels.plain import attention
from tests.support.kernels.pool import DEVICE, Pool, fill_heads, make_pool, randn


@attrs.define
class Layer:
    """One layer's pages and rings, as a cache holds them after `lengths` tokens."""

    pool: Pool
    flat: Pages
    heads: Heads
    ring_k: torch.Tensor
    ring_q: torch.Tensor
    lengths: torch.Tensor
    window: int

    def call(self, op, policy, scale, pages=None, **more):
        options = {k: v for k, v in attrs.asdict(policy).items() if k not in ("budget", "when")}
        ring = Ring(self.ring_k, self.ring_k, self.ring_k[..., 0].byte())
        args = (self.heads, ring, self.ring_q, self.lengths, self.window)
        given = self.pool.pages if pages is None else pages
        return op(given, *args, scale, **options, **more)

    def view(self, dtype, scale, observation):
        """What a cache shows of the layer, built without the library's code."""
        _, heads, slots, _ = self.ring_k.shape
        ids = self.heads.table.long()
        meta = self.flat.meta[ids].flatten(2)
        token = torch.arange(meta.shape[2], device=DEVICE)
        valid = token < self.heads.counts[..., None]
        recent = torch.arange(-self.window, 0, device=DEVICE) + self.lengths[:, None]
        at = torch.arange(-observation, 0, device=DEVICE) + self.lengths[:, None]
        ring = lambda x, p: torch.stack([r[:, p[b] % x.shape[2]] for b, r in enumerate(x)])  # noqa: E731
        keys = self.flat.k[ids].flatten(2, 3).masked_fill(~valid[..., None], 0)
        return EvictionView(
            0, keys.to(dtype), keys, (meta & ((1 << POSITION_BITS) - 1)).masked_fill(~valid, 0),
            valid, valid, ring(self.ring_k, recent).to(dtype), recent >= 0, self.lengths, scale,
            ring(self.ring_q, at).to(dtype), at >= 0,
        )  # fmt: skip


def make_layer(
    lengths, kv_heads, group, dim, dtype, window, observation, *, page=4, seed=0, first="low",
    factor=1.0,
):  # fmt: skip
    """Heads that hold every token out of the window, a random part of them, or none."""
    rng = torch.Generator().manual_seed(seed)
    kept = []
    for length in lengths:
        old = torch.arange(max(length - window, 0))
        rows = [old, old[torch.rand(len(old), generator=rng) < 0.6], old[:0]]
        kept.append([rows[head % 3] for head in range(kv_heads)])
    held = [[len(x) for x in row] for row in kept]
    need = sum(-(-n // page) for row in held for n in row) + 2
    pool = make_pool(need, page, dim, dtype, slab_pages=4, first=first)
    table, counts = fill_heads(pool, held, seed, kept)
    slots, query_slots = window + 3, observation + 3
    ring_k = randn(len(lengths), kv_heads, slots, dim, dtype=dtype, seed=seed + 1)
    ring_q = randn(len(lengths), kv_heads * group, query_slots, dim, dtype=dtype, seed=seed + 2)
    for b, length in enumerate(lengths):  # what was never written may be anything
        ring_k[b, :, min(length, slots) :] = float("nan")
        ring_q[b, :, min(length, query_slots) :] = float("nan")
    flat = pool.flat()
    flat = flat._replace(k=flat.k.nan_to_num())
    return Layer(
        pool, flat, Heads(table, counts), ring_k, ring_q * factor,
        torch.tensor(lengths, device=DEVICE), window,
    )  # fmt: skip


def clean(view):
    """A cache's rings hold zeros where nothing was written; NaN there must not reach a score."""
    recent, queries = view.recent_keys.nan_to_num(), view.queries.nan_to_num()
    return view._replace(recent_keys=recent, queries=queries)


def masses(layer, policy, scale, asks, kind):
    """`window_scores` with a kernel of 1, query by query, computed in a dtype."""
    view = clean(layer.view(kind, scale, policy.observation))
    batch, kv_heads, width = view.valid.shape
    group = view.queries.shape[1] // kv_heads
    sinks = asks.sinks(kv_heads * group)
    out = torch.zeros(batch, kv_heads, width, dtype=kind, device=DEVICE)
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(kv_heads)).tolist():
        keys = torch.cat([view.keys[b, h], view.recent_keys[b, h]])
        recent = view.recent_valid[b] & (policy.normalize == "visible")
        there = torch.cat([view.valid[b, h], recent])
        first = view.lengths[b] - layer.window
        at = torch.cat([view.positions[b, h], first + torch.arange(layer.window, device=DEVICE)])
        found = []
        for g in range(group):
            for i in range(policy.observation):
                now = view.lengths[b] - policy.observation + i
                if now < 0:
                    continue
                head = h * group + g
                q, visible = view.queries[b, head, i, None], there & (at <= now)
                values = torch.eye(len(keys), dtype=kind, device=DEVICE)
                own = None if sinks is None else sinks[head]
                weights = attention(q, keys, values, visible[None], scale, asks, own)
                found.append(weights[0, :width].nan_to_num() * view.valid[b, h])
        each = torch.stack(found).view(group, -1, width)
        if policy.group == "mean":
            out[b, h] = each.mean((0, 1))
        elif policy.normalize == "global":
            out[b, h] = each.amax(0).mean(0)
        else:
            out[b, h] = each.mean(1).amax(0)
    return out
