"""The contract in float64 with plain lists: one layer, one sequence. Decides every other test."""

from __future__ import annotations

import torch

from kvpolicy import Adaptive, AtPromptEnd, TotalCap
from kvpolicy.types import EvictionView, Write


class Oracle:
    """Every token ever seen, and for each KV head which of them are admitted and not evicted."""

    def __init__(self, pipeline, spec, layer):
        self.layer, self.spec, self.n = layer, spec, 0
        self.heads, self.group, self.P = spec.kv_heads, spec.group, spec.page_size
        self.slides = spec.slides(layer) is not None
        self.W = spec.slides(layer) or pipeline.window
        place = (torch.device("cpu"), spec.dtype, "reference")
        self.admission = pipeline.admission.place(*place).at(layer)
        self.eviction = pipeline.eviction.place(*place).at(layer)
        self.selection = pipeline.selection.at(layer)
        empty = torch.zeros(spec.kv_heads, 0, spec.head_dim, dtype=spec.dtype)
        self.q, self.k, self.v, self.pre = empty.repeat(spec.group, 1, 1), empty, empty, empty
        self.alive = self.mark = torch.zeros(self.heads, 0, dtype=torch.bool)
        self.evicted, self.read, self.slack = [0] * self.heads, None, 0.0

    def pages(self, h):
        """Global tokens of a head: admitted, not evicted, out of the window."""
        return self.alive[h, : max(self.n - self.W, 0)].nonzero()[:, 0].tolist()

    def store(self, q, k, v, pre, prompt):
        for name, new in (("q", q), ("k", k), ("v", v), ("pre", pre)):
            setattr(self, name, torch.cat([getattr(self, name), new], 1))
        old, self.n = self.n, self.k.shape[1]
        cu = torch.tensor([0, self.n], dtype=torch.int32)
        at = torch.arange(self.n)
        write = Write(self.k, self.v, at, cu, self.layer, range(self.heads), key_pre=self.pre)
        admit, mark = self.admission.admit(write), self.eviction.mark(write)
        mark = torch.ones_like(admit) if mark is None or not prompt else mark
        self.alive = torch.cat([self.alive, admit[:, old:] & (not self.slides)], 1)
        self.mark = torch.cat([self.mark, mark[:, old:]], 1)

    def attend(self, at, visible):
        """Queries `at` over `visible` [Hq, len(at), n]; also how far the plain formula errs."""

        def formula(dtype):
            k, v = (x.to(dtype).repeat_interleave(self.group, 0) for x in (self.k, self.v))
            s = (self.q[:, at].to(dtype) @ k.mT).to(torch.promote_types(dtype, torch.float32))
            s = (s * self.spec.softmax_scale).masked_fill(~visible, float("-inf"))
            return s.softmax(-1).to(dtype) @ v

        exact = formula(torch.float64)
        error = (formula(self.spec.dtype).double() - exact).abs().max()
        self.slack = max(self.slack, float(error))
        return exact

    def prompt(self, q, k, v, pre):
        old = self.n
        self.store(q, k, v, pre, prompt=True)
        i, j = torch.arange(old, self.n)[:, None], torch.arange(self.n)
        far = self.alive.repeat_interleave(self.group, 0)[:, None]
        return self.attend(i[:, 0], (j <= i) & ((i - j < self.W) | far))

    def decode(self, q, k, v, pre):
        self.store(q, k, v, pre, prompt=False)
        i = self.n - 1
        visible = torch.zeros(self.q.shape[0], 1, self.n, dtype=torch.bool)
        visible[:, :, max(0, i - self.W + 1) :] = True
        self.read = [tokens for h in range(self.heads) for tokens in self.select(i, h)]
        for h, tokens in enumerate(self.read):
            visible[h, 0, tokens] = True
        return self.attend([i], visible)

    def select(self, i, h):
        """Global tokens that the query at `i` reads of KV head `h`, for each query head."""
        policy, tokens = self.selection, self.pages(h)
        pages = [tokens[a : a + self.P] for a in range(0, len(tokens), self.P)]
        if policy.neutral or self.slides or not pages:
            return [tokens] * self.group
        counts, m = torch.tensor([len(page) for page in pages]), len(pages)
        keys = torch.zeros(m, self.P, self.k.shape[2], dtype=self.k.dtype)
        for page, at in zip(keys, pages, strict=True):
            page[: len(at)] = self.k[h, at]
        summary = policy.summarize(keys, torch.arange(self.P) < counts[:, None])
        query = self.q[h * self.group : (h + 1) * self.group, i]
        scores = policy.score(query[None, None], summary[None, None], counts[None, None])[0, 0]
        if policy.group != "each":
            scores = (scores.mean(0) if policy.group == "mean" else scores.amax(0))[None]
        sure = [*range(m - 1, max(m - 1 - policy.last, -1), -1), *range(min(policy.first, m))]
        chosen = []
        for s in scores.tolist():
            rest = sorted(set(range(m)) - set(sure), key=lambda p: (-s[p], p))
            order = list(dict.fromkeys([*sure, *rest]))[: policy.pages(self.W, self.P)]
            chosen.append(sorted(j for p in order for j in pages[p]))
        return chosen if policy.group == "each" else chosen * self.group

    def crop(self, count):
        self.n -= count
        for name in ("q", "k", "v", "pre", "alive", "mark"):
            setattr(self, name, getattr(self, name)[:, : self.n])

    def scores(self):
        """What the eviction says of each head's global tokens: `[head][token] -> float`."""
        pages = [self.pages(h) for h in range(self.heads)]
        if not any(pages):
            return [{} for _ in pages]
        at = torch.tensor([p + [0] * (max(map(len, pages)) - len(p)) for p in pages])
        valid = torch.tensor([[i < len(p) for i in range(at.shape[1])] for p in pages])
        pick = lambda x: x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))[None]  # noqa: E731
        recent = torch.arange(self.n - self.W, self.n)
        qs = torch.arange(self.n - max(self.eviction.queries, 1), self.n)
        view = EvictionView(
            self.layer, pick(self.k), pick(self.v), at[None], valid[None],
            (self.mark.gather(1, at) & valid)[None], self.k[:, recent.clamp(min=0)][None],
            (recent >= 0)[None], torch.tensor([self.n]), self.spec.softmax_scale,
            self.q[:, qs.clamp(min=0)][None], (qs >= 0)[None],
        )  # fmt: skip
        found = self.eviction.score(view)[0].tolist()
        return [dict(zip(p, s, strict=False)) for p, s in zip(pages, found, strict=True)]


def evict(layers, decoding=False):
    """One eviction of a sequence, given by its layers; returns whether anything changed."""
    idle = [
        o.slides or o.eviction.neutral or (decoding and o.eviction.when != "decode") for o in layers
    ]
    scores = [None if off else o.scores() for o, off in zip(layers, idle, strict=True)]
    caps, cap = None, layers[0].eviction.budget
    if isinstance(cap, TotalCap):
        caps = cap.lengths([[len(o.pages(h)) for h in range(o.heads)] for o in layers])
    changed = False
    for o, mine in zip(layers, scores, strict=True):
        if mine is None:
            continue
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
            o.alive[h, gone] = False
            o.evicted[h] += len(gone)
            changed |= bool(gone)
        if isinstance(o.eviction, AtPromptEnd):
            o.alive[:, max(o.n - o.W, 0) :] &= o.mark[:, max(o.n - o.W, 0) :]
            changed = True
    return changed
