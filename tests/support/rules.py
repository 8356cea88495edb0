"""What policies choose among lists of tokens: pages to read, and tokens to drop for a budget.

The oracle's other half, like it written from the contract and importing policy objects only.
"""

from __future__ import annotations

import torch

from kvpolicy import (
    LUKV,
    AcrossLayers,
    Adaptive,
    EvictionView,
    HeadKV,
    LazyLayers,
    PromptView,
    TotalCap,
)
from tests.support.contract.told import asked


def read(o, i, h):
    """Global tokens that the query at `i` reads of KV head `h`, for each query head."""
    policy, tokens, size = o.selection, o.pages(h), o.spec.page_size
    pages = [tokens[a : a + size] for a in range(0, len(tokens), size)]
    if policy.neutral or o.slides or not pages:
        return [tokens] * o.group
    counts, m = torch.tensor([len(page) for page in pages]), len(pages)
    keys = torch.zeros(m, size, o.k.shape[2], dtype=o.k.dtype)
    for page, at in zip(keys, pages, strict=True):
        page[: len(at)] = o.k[h, at]
    summary = policy.summarize(keys, torch.arange(size) < counts[:, None])
    query = o.q[h * o.group : (h + 1) * o.group, i]
    scores = policy.score(query[None, None], summary[None, None], counts[None, None])[0, 0]
    if policy.group != "each":
        scores = (scores.mean(0) if policy.group == "mean" else scores.amax(0))[None]
    last = len(pages[-1]) < size if policy.last == "partial" else policy.last
    sure = [*range(m - 1, max(m - 1 - last, -1), -1), *range(min(policy.first, m))]
    chosen = []
    for s in scores.tolist():
        rest = sorted(set(range(m)) - set(sure), key=lambda p: (-s[p], p))
        order = list(dict.fromkeys([*sure, *rest]))[: policy.pages(o.W, size)]
        chosen.append(sorted(j for p in order for j in pages[p]))
    return chosen if policy.group == "each" else chosen * o.group


def chosen(o, start):
    """Whether the query heads of a prompt call from `start` on may read each token: [Hq, T, n]."""
    policy, tile, i, j = o.selection, o.selection.tile, torch.arange(start, o.n), torch.arange(o.n)
    every = torch.ones(1, len(i), len(j), dtype=torch.bool)
    if tile is None or o.slides or o.n <= o.W or not len(i):
        return every
    there = o.k.masked_fill(~o.alive[..., None], 0)
    given = o.q[:, start:], start, there, o.alive, o.sizes.scale, o.sizes.softcap
    reads = policy.prompt(PromptView(o.layer, range(o.heads), *given))
    own = i // tile - start // tile
    found = reads.blocks[:, own][:, :, j // tile]
    if reads.columns is not None:
        lists = reads.columns.expand(-1, reads.blocks.shape[1], -1)[:, own]
        for h, rows in enumerate(lists.tolist()):
            for n, columns in enumerate(rows):
                found[h, n, [x for x in columns if 0 <= x < o.n]] = True
    return found.repeat_interleave(o.q.shape[0] // found.shape[0], 0)


def scores(o):
    """What the eviction says of each head's global tokens: `[head][token] -> float`."""
    pages = [o.pages(h) for h in range(o.heads)]
    if not any(pages):
        return [{} for _ in pages]
    at = torch.tensor([p + [0] * (max(map(len, pages)) - len(p)) for p in pages])
    valid = torch.tensor([[i < len(p) for i in range(at.shape[1])] for p in pages])
    pick = lambda x: x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))[None]  # noqa: E731
    recent = torch.arange(o.n - o.W, o.n)
    numbers = o.numbers()
    qs = torch.arange(o.n - max(o.eviction.queries, 1), o.n)
    view = EvictionView(
        o.layer, pick(o.k), pick(o.v), at[None], valid[None],
        (o.mark.gather(1, at) & valid)[None], o.k[:, recent.clamp(min=0)][None],
        (recent >= 0)[None], torch.tensor([o.n]), o.sizes.scale,
        o.q[:, qs.clamp(min=0)][None], (qs >= 0)[None], softcap=o.sizes.softcap, sinks=o.sinks,
        numbers=(numbers.gather(1, at) * valid)[None],
        recent_numbers=(numbers[:, recent.clamp(min=0)] * (recent >= 0))[None],
        recent_values=o.v[:, recent.clamp(min=0)][None],
        **asked(o),
    )  # fmt: skip
    found = o.eviction.score(view)[0].tolist()
    return [dict(zip(p, s, strict=False)) for p, s in zip(pages, found, strict=True)]


def nudged(scores, kept):
    """Scores, a little more for tokens in `kept`: ties that rounding decided stay as they were."""
    return {j: s * (1 + 1e-5 if j in kept else 1 - 1e-5) for j, s in scores.items()}


def dealt(budget, layers):
    """Global tokens of each head that a budget over layers leaves, `[layer][head]`."""
    o, heads = layers[0][0], sum(o.heads for o, _ in layers)
    n = budget.allowed(o.n, o.W, 0, o.spec.layers)
    if isinstance(budget, HeadKV):
        worth = [[x**budget.temperature for x in row] for row in budget.importance]
        pool, total = n // budget.beta, sum(sum(worth[o.layer]) for o, _ in layers)
        return [
            [round(x / total * pool * heads + n - pool) for x in worth[o.layer]] for o, _ in layers
        ]
    if isinstance(budget, LUKV):
        return [_by_parts(budget.parts[o.layer], o) for o, _ in layers]
    if isinstance(budget, LazyLayers):
        share = [sum(sum(s.values()) for s in mine) / o.heads for o, mine in layers]
        lazy = [x < 1 - budget.threshold for x in share]
        busy = sum(o.heads for (o, _), idle in zip(layers, lazy, strict=True) if not idle)
        spare = sum(o.heads for (o, _), idle in zip(layers, lazy, strict=True) if idle)
        few = min(n, budget.held) if busy else n
        more = n + spare * (n - few) // max(busy, 1)
        return [
            [few if idle else more] * o.heads for (o, _), idle in zip(layers, lazy, strict=True)
        ]
    items, counts = [], [[0] * o.heads for o, _ in layers]
    for at, (_, mine) in enumerate(layers):
        for h, s in enumerate(mine):
            best = sorted((x for x in s.values() if x > float("-inf")), reverse=True)
            sure = min(int(budget.floor * n), len(best))
            counts[at][h] = sure
            items += [(-x, at, h) for x in best[sure:]]
    for _, at, h in sorted(items)[: max(n * heads - sum(map(sum, counts)), 0)]:
        counts[at][h] += 1
    return counts


def _by_parts(parts, o):
    """Global tokens of a layer's heads: parts of all, rounded together, the fullest first."""
    whole = [int(x * o.n) for x in parts]
    short = round(sum(x * o.n for x in parts)) - sum(whole)
    order = sorted(range(len(parts)), key=lambda h: (whole[h] - parts[h] * o.n, h))
    return [max(n + (h in order[:short]) - o.W, 0) for h, n in enumerate(whole)]


def evict(layers, decoding=False, kept=None):
    """One eviction of a sequence, given by its layers; returns whether anything changed.

    `kept(layer, head)` may tell what a cache in low precision kept, see `nudged`.
    """
    idle = [
        o.slides or o.eviction.neutral or (decoding and o.eviction.when != "decode") for o in layers
    ]
    found = [None if off else scores(o) for o, off in zip(layers, idle, strict=True)]
    caps, cap = None, layers[0].eviction.budget
    if isinstance(cap, TotalCap):
        caps = cap.lengths([[len(o.pages(h)) for h in range(o.heads)] for o in layers])
    if isinstance(cap, AcrossLayers | LazyLayers | HeadKV | LUKV):
        acting = [(o, mine) for o, mine in zip(layers, found, strict=True) if mine is not None]
        caps = {o.layer: n for (o, _), n in zip(acting, dealt(cap, acting), strict=True)}
    changed, gone_of = False, {}
    for o, mine in zip(layers, found, strict=True):
        if mine is None:
            continue
        if kept is not None:
            mine = [nudged(s, kept(o.layer, h)) for h, s in enumerate(mine)]
        budget = o.eviction.budget
        best = [sorted(s.items(), key=lambda item: (-item[1], -item[0])) for s in mine]
        keep = [[j for j, score in items if score > float("-inf")] for items in best]
        if caps is not None:
            keep = [k[:n] for k, n in zip(keep, caps[o.layer], strict=True)]
        elif budget is not None:
            n = budget.allowed(o.n, o.W, o.layer, o.spec.layers)
            if isinstance(budget, Adaptive):
                sure = [k[: int(budget.floor * n)] for k in keep]
                rest = [(s[j], h, j) for h, s in enumerate(mine) for j in s if j not in sure[h]]
                rest = sorted(rest, reverse=True)[: n * o.heads - sum(map(len, sure))]
                keep = [k + [j for _, g, j in rest if g == h] for h, k in enumerate(sure)]
            else:
                keep = [k[:n] for k in keep]
        for h, s in enumerate(mine):
            gone = sorted(set(s) - set(keep[h]))
            gone_of.setdefault(o.layer, []).append(gone)
            o.alive[h, gone] = False
            o.evicted[h] += len(gone)
            changed |= bool(gone)
        if o.eviction.forgets_window and not decoding:
            o.alive[:, max(o.n - o.W, 0) :] &= o.mark[:, max(o.n - o.W, 0) :]
            changed = True
    if any(any(gone) for gone in gone_of.values()):
        for o, mine in zip(layers, found, strict=True):
            if mine is not None and o.eviction.remembers:
                o.remember(mine)
    return changed
