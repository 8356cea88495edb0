"""The contract in float64 with plain lists: one layer, one sequence. Decides every other test."""

from __future__ import annotations

import torch

from kvpolicy.types import EvictionView, Write


class Oracle:
    def __init__(self, pipeline, layer, layers, q, k, v, k_pre, scale, page_size=16, slides=None):
        self.pipe, self.layer, self.layers = pipeline, layer, layers
        self.q, self.k, self.v = q, k, v  # [Hq, N, D], [Hkv, N, D]
        self.scale, self.P = scale, page_size
        self.W = slides or pipeline.window
        self.slides, self.heads = slides is not None, k.shape[0]
        self.group = q.shape[0] // k.shape[0]
        n = k.shape[1]
        cu = torch.tensor([0, n], dtype=torch.int32)
        write = Write(k, v, torch.arange(n), cu, layer, range(self.heads), key_pre=k_pre)
        self.admit = pipeline.admission.at(layer).admit(write)
        mark = pipeline.eviction.at(layer).mark(write)
        self.mark = torch.ones_like(self.admit) if mark is None else mark.clone()
        self.n = 0
        self.pages = [[] for _ in range(self.heads)]  # global tokens of each head, in position order
        self.alive = [self.admit[h].tolist() for h in range(self.heads)]  # admitted and not evicted
        self.evicted = [[] for _ in range(self.heads)]
        self.read = None

    def attend(self, i, h, at):
        at = sorted(at)
        s = (self.q[h, i].double() @ self.k[h // self.group, at].double().T) * self.scale
        return s.softmax(-1) @ self.v[h // self.group, at].double()

    def near(self, i):
        return set(range(max(0, i - self.W + 1), i + 1))

    def promote(self):
        for h in range(self.heads):
            done = max([*self.pages[h], *self.evicted[h], -1])
            new = range(done + 1, max(0, self.n - self.W))
            self.pages[h] += [] if self.slides else [j for j in new if self.alive[h][j]]

    def prompt(self, count):
        outs = []
        for i in range(self.n, self.n + count):
            rows = []
            for h in range(self.q.shape[0]):
                far = {j for j in range(i + 1) if self.alive[h // self.group][j]}
                rows.append(self.attend(i, h, self.near(i) | (set() if self.slides else far)))
            outs.append(torch.stack(rows))
        self.n += count
        self.promote()
        return torch.stack(outs, 1) if outs else None  # [Hq, count, D]

    def decode(self):
        i = self.n
        for h in range(self.heads):
            self.mark[h, i] = True
        self.n += 1
        self.promote()
        rows, self.read = [], []
        for h in range(self.q.shape[0]):
            chosen = self.select(i, h)
            self.read.append(sorted(chosen))
            rows.append(self.attend(i, h, self.near(i) | chosen))
        return torch.stack(rows)[:, None]

    def select(self, i, h):
        policy, kv = self.pipe.selection.at(self.layer), h // self.group
        tokens = self.pages[kv]
        pages = [tokens[a : a + self.P] for a in range(0, len(tokens), self.P)]
        if policy.neutral or self.slides or not pages:
            return set(tokens)
        members = range(kv * self.group, (kv + 1) * self.group) if policy.group != "each" else [h]
        query = torch.stack([self.q[g, i] for g in members])[None, None]
        scores = []
        for page in pages:
            keys = torch.zeros(1, self.P, self.k.shape[2], dtype=self.k.dtype)
            keys[0, : len(page)] = self.k[kv, page]
            summary = policy.summarize(keys, torch.arange(self.P)[None] < len(page))
            s = policy.score(query, summary[None, None], torch.tensor([[[len(page)]]]))[0, 0, :, 0]
            scores.append(float(s.mean() if policy.group == "mean" else s.max()))
        budget, m = policy.pages(self.W, self.P), len(pages)
        sure = [*range(m - 1, max(m - 1 - policy.last, -1), -1), *range(min(policy.first, m))]
        rest = sorted(set(range(m)) - set(sure), key=lambda p: (-scores[p], p))
        order = list(dict.fromkeys([*sure, *rest]))[:budget]
        return {j for p in order for j in pages[p]}

    def view(self):
        n, width, kv = self.n, max(map(len, self.pages)), self.heads
        at = torch.zeros(kv, width, dtype=torch.long)
        valid = torch.zeros(kv, width, dtype=torch.bool)
        for h, tokens in enumerate(self.pages):
            at[h, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            valid[h, : len(tokens)] = True
        pick = lambda x, index: x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))  # noqa: E731
        recent, w = torch.arange(n - self.W, n), max(self.pipe.eviction.at(self.layer).queries, 1)
        qs = torch.arange(n - w, n)
        return EvictionView(
            self.layer, pick(self.k, at)[None], pick(self.v, at)[None], at[None], valid[None],
            (self.mark.gather(1, at) & valid)[None], self.k[:, recent.clamp(min=0)][None],
            (recent >= 0)[None], torch.tensor([n]), self.scale, self.q[:, qs.clamp(min=0)][None],
            (qs >= 0)[None],
        )  # fmt: skip
