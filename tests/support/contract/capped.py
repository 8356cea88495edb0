"""What tests of caps share: sizes, an eviction that only a cap calls, a pipeline fed with noise."""

from __future__ import annotations

import attrs
import torch

from kvpolicy import CacheSpec, Tokens
from kvpolicy.eviction import Eviction

WINDOW, INTERVAL, LAYERS, KV_HEADS, DIM = 6, 4, 2, 2, 8
SPEC = CacheSpec(
    layers=LAYERS, heads=4, kv_heads=KV_HEADS, head_dim=DIM, page_size=4, rollback=5,
    interval=INTERVAL, dtype=torch.float64,
)  # fmt: skip


def taste(position, layer):
    """Scores with many ties, in no order."""
    return (position * 7 + 3 * layer) % 11


@attrs.frozen(kw_only=True)
class Taste(Eviction):
    """Evicts only because a cap asks for it."""

    budget = Tokens(10_000)

    def score(self, view):
        return taste(view.positions, view.layer).double()


class Feed:
    """A pipeline fed with random tokens, and what they were."""

    def __init__(self, pipeline, spec, batch=1, seed=0):
        self.pipeline, self.state = pipeline, pipeline.init(spec, batch)
        self.make = torch.Generator().manual_seed(seed)
        self.seen = [[] for _ in range(batch)]  # [row] -> [layer][position] of key, value

    def call(self, added, phase):
        spec, state, total = self.state.spec, self.state, sum(added)
        self.pipeline.begin(state, added, phase)
        outs, news = [], []
        for layer in range(spec.layers):
            q, k, v = (
                torch.randn(h, total, DIM, generator=self.make, dtype=spec.dtype).to(spec.device)
                for h in (spec.heads, KV_HEADS, KV_HEADS)
            )
            tensors = (q, k, v)
            if phase == "decode":
                tensors = tuple(x.transpose(0, 1)[:, :, None] for x in tensors)
            outs.append(self.pipeline.attend(state, layer, *tensors))
            news.append((q, k, v))
        self.pipeline.commit(state)
        return outs, news

    def held(self):
        report = self.pipeline.report(self.state)
        return report.pages + report.reserved + report.positions + report.summaries

    def longest(self):
        spec = self.state.spec
        return max(
            len(self.state.kept(layer, row, head))
            for layer in range(spec.layers)
            for row in range(self.state.batch)
            for head in range(spec.kv_heads)
        )
