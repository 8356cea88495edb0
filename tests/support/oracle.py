"""The contract in float64 with plain lists: one layer, one sequence. Decides every other test."""

from __future__ import annotations

import copy

import torch

from kvpolicy import Write
from tests.support.contract.streams import hidden_of
from tests.support.rules import chosen, read


def combined(weights, group):
    """Weights `[Hkv, G, ...]` of the query heads of each KV head together."""
    return {"mean": weights.mean(1), "sum": weights.sum(1), "max": weights.amax(1)}[group]


class Oracle:
    """Every token ever seen, and for each KV head which of them are admitted and not evicted."""

    def __init__(self, pipeline, spec, layer, sinks=None):
        self.layer, self.spec, self.n = layer, spec, 0
        self.sizes, self.sinks = spec.at(layer), sinks
        self.heads = self.sizes.kv_heads
        self.group = self.sizes.heads // self.heads
        self.slides = spec.slides(layer) is not None
        self.W = spec.slides(layer) or pipeline.window
        place = (torch.device("cpu"), spec.dtype, "reference")
        self.admission = pipeline.admission.place(*place).at(layer)
        self.eviction = pipeline.eviction.place(*place).at(layer)
        self.selection = pipeline.selection.at(layer)
        empty = torch.zeros(self.heads, 0, self.sizes.head_dim, dtype=spec.dtype)
        self.q, self.k, self.pre = empty.repeat(self.group, 1, 1), empty, empty
        self.v = empty.new_zeros(self.heads, 0, self.sizes.value_dim)
        self.alive = self.mark = torch.zeros(self.heads, 0, dtype=torch.bool)
        self.evicted, self.read, self.slack = [0] * self.heads, None, 0.0
        # Numbers as they were given or remembered, and since then the weights of each query.
        self.base, self.weights = torch.zeros(self.heads, 0, dtype=torch.float64), []

    def pages(self, h):
        """Global tokens of a head: admitted, not evicted, out of the window."""
        return self.alive[h, : max(self.n - self.W, 0)].nonzero()[:, 0].tolist()

    def store(self, q, k, v, pre, prompt):
        for name, new in (("q", q), ("k", k), ("v", v), ("pre", pre)):
            setattr(self, name, torch.cat([getattr(self, name), new], 1))
        old, self.n = self.n, self.k.shape[1]
        cu, at = torch.tensor([0, self.n - old], dtype=torch.int32), torch.arange(old, self.n)
        heads, hidden = range(self.heads), hidden_of(pre)
        write = Write(k, v, at, cu, self.layer, heads, key_pre=pre, hidden=hidden)
        admit, mark = self.admission.admit(write), self.eviction.mark(write)
        if not prompt and (stays := self.eviction.admit(write)) is not None:
            admit = admit & stays
        mark = torch.ones_like(admit) if mark is None or not prompt else mark
        self.alive = torch.cat([self.alive, admit & (not self.slides)], 1)
        self.mark = torch.cat([self.mark, mark], 1)
        number = self.eviction.number(write) if self.eviction.numbered else None
        number = torch.zeros(self.heads, self.n - old) if number is None else number
        self.base = torch.cat([self.base, number.double()], 1)

    def weigh(self, at, visible):
        """Remembers what queries `at` gave the tokens `visible` [Hq, len(at), n]."""
        policy = self.eviction
        if not policy.accumulates or policy.replayed or policy.neutral or self.slides:
            return
        given = self.softmax(at, visible, torch.float64).nan_to_num(0.0)
        given = combined(given.unflatten(0, (self.heads, -1)), policy.group)
        self.weights += zip(at, given.unbind(1), strict=True)

    def replay(self, q, k, v, pre, span, sinks):
        """Tokens that look back at `span`: what their weights make of numbers, and nothing else."""
        twin, own = copy.copy(self), self.n
        twin.store(q, k, v, pre, prompt=True)
        i, j = torch.arange(own, twin.n)[:, None], torch.arange(twin.n)
        far = twin.alive.repeat_interleave(self.group, 0)[:, None]
        visible = (j <= i) & ((i - j < self.W) | far)
        visible = visible & ((j < sinks) | ((j >= span.start) & (j < span.stop)) | (j >= own))
        given = twin.softmax(i[:, 0], visible, torch.float64).nan_to_num(0.0)
        looked = (j >= span.start) & (j < span.stop)
        looked = looked & (twin.alive | (j >= twin.n - self.W))  # others leave for good
        given = given.unflatten(0, (self.heads, -1)) * looked[:, None, None]
        given = combined(given, self.eviction.group)[..., :own]
        largest = self.eviction.accumulates == "max"
        given = given.amax(1) if largest else given.sum(1)
        self.base = torch.maximum(self.base, given) if largest else self.base + given

    def numbers(self):
        """The number of every token for each head."""
        found = self.base
        for _, given in self.weights:
            given = torch.nn.functional.pad(given, (0, self.n - given.shape[1]))
            largest = self.eviction.accumulates == "max"
            found = torch.maximum(found, given) if largest else found + given
        return found

    def remember(self, scores):
        """Scores `[head][token]` become the numbers of tokens."""
        self.base, self.weights = self.numbers().clone(), []
        for h, mine in enumerate(scores):
            for j, score in mine.items():
                self.base[h, j] = score

    def attend(self, at, visible):
        """Queries `at` over `visible` [Hq, len(at), n]; also how far the plain formula errs."""

        def formula(dtype):
            weights = self.softmax(at, visible, dtype).to(dtype)
            return weights @ self.v.to(dtype).repeat_interleave(self.group, 0)

        exact = formula(torch.float64)
        if self.spec.dtype != torch.float64:
            error = (formula(self.spec.dtype).double() - exact).abs().max()
            self.slack = max(self.slack, float(error))
        return exact

    def softmax(self, at, visible, dtype):
        """Weights of queries `at` over `visible` tokens, computed in `dtype`."""
        if self.sizes.chunk is not None:
            j = torch.arange(self.n) // self.sizes.chunk
            visible = visible & (j == torch.as_tensor(at)[:, None] // self.sizes.chunk)
        k = self.k.to(dtype).repeat_interleave(self.group, 0)
        s = (self.q[:, at].to(dtype) @ k.mT).to(torch.promote_types(dtype, torch.float32))
        s, cap = s * self.sizes.scale, self.sizes.softcap
        s = s if cap is None else cap * (s / cap).tanh()
        s = s.masked_fill(~visible, float("-inf"))
        if self.sinks is not None:
            s = torch.cat([s, self.sinks.to(s)[:, None, None].expand(*s.shape[:2], 1)], -1)
        return s.softmax(-1)[..., : self.n]

    def prompt(self, q, k, v, pre):
        old = self.n
        self.store(q, k, v, pre, prompt=True)
        i, j = torch.arange(old, self.n)[:, None], torch.arange(self.n)
        far = self.alive.repeat_interleave(self.group, 0)[:, None]
        near = i - j < self.W
        self.weigh(i[:, 0].tolist(), (j <= i) & (near | far))
        return self.attend(i[:, 0], (j <= i) & (near | (far & chosen(self, old))))

    def decode(self, q, k, v, pre):
        self.store(q, k, v, pre, prompt=False)
        i = self.n - 1
        visible = torch.zeros(self.q.shape[0], 1, self.n, dtype=torch.bool)
        visible[:, :, max(0, i - self.W + 1) :] = True
        self.weigh([i], visible | self.alive.repeat_interleave(self.group, 0)[:, None])
        self.read = [tokens for h in range(self.heads) for tokens in read(self, i, h)]
        for h, tokens in enumerate(self.read):
            visible[h, 0, tokens] = True
        return self.attend([i], visible)

    def crop(self, count):
        self.n -= count
        for name in ("q", "k", "v", "pre", "alive", "mark", "base"):
            setattr(self, name, getattr(self, name)[:, : self.n])
        self.weights = [(i, given[:, : self.n]) for i, given in self.weights if i < self.n]
