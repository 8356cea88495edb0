"""Three new policies and a budget, checked by the conformance kit and composed in one cache.

    python examples/new_policy.py

No registration: a policy is a frozen class with one or two methods. See docs/writing-a-policy.md.
"""

from __future__ import annotations

import argparse

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpolicy import (
    Admission,
    Budget,
    CachePipeline,
    CacheSpec,
    Eviction,
    EvictionView,
    Report,
    Selection,
    Tokens,
    Write,
)
from kvpolicy.testing import check_admission, check_eviction, check_selection


@attrs.frozen(kw_only=True)
class Strided(Admission):
    """Admits the first `sinks` tokens and every `stride`-th one, shifted from head to head."""

    stride: int = 4
    sinks: int = 4

    def admit(self, write: Write) -> Tensor:
        heads = torch.arange(write.heads.start, write.heads.stop, device=write.positions.device)
        on_grid = (write.positions + heads[:, None]) % self.stride == 0
        return on_grid | (write.positions < self.sinks)


@attrs.frozen(kw_only=True)
class MeanKey(Selection):
    """Reads the pages whose mean key fits the query best."""

    budget: Tokens

    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        count = valid.sum(1, keepdim=True).clamp(min=1)
        return keys.masked_fill(~valid[..., None], 0).sum(1) / count

    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        return query @ summary.transpose(2, 3)


@attrs.frozen(kw_only=True)
class KeyDiff(Eviction):
    """Keeps the keys that differ most from the mean direction of their head's stored keys.

    KeyDiff (Park et al., 2025), on the global tokens.
    """

    budget: Budget

    def score(self, view: EvictionView) -> Tensor:
        direction = F.normalize(view.keys, dim=-1).masked_fill(~view.valid[..., None], 0)
        return -F.cosine_similarity(view.keys, direction.sum(2, keepdim=True), dim=-1)


@attrs.frozen
class SquareRoot(Budget):
    """`factor` times the square root of the tokens seen."""

    factor: float = 32.0

    def tokens_per_head(self, seen: int, layer: int, layers: int) -> int:
        return round(self.factor * seen**0.5)


def run(pipeline: CachePipeline, prompt: int = 400, steps: int = 8) -> Report:
    """Sends one random sequence through a two-layer cache and reports what it holds."""
    spec = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=32)
    cache = pipeline.init(spec)

    def call(phase: str, tokens: int, *batch: int) -> None:
        pipeline.begin(cache, [tokens], phase)
        for layer in range(spec.layers):
            query = torch.randn(*batch, spec.heads, tokens, spec.head_dim)
            key, value = torch.randn(2, *batch, spec.kv_heads, tokens, spec.head_dim)
            pipeline.attend(cache, layer, query, key, value)
        pipeline.commit(cache)

    call("prompt", prompt)
    pipeline.end_prompt(cache)
    for _ in range(steps):
        call("decode", 1, 1)
    return pipeline.report(cache)


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    torch.manual_seed(0)
    check_admission(Strided())
    check_selection(MeanKey(budget=Tokens(48)))
    check_eviction(KeyDiff(budget=Tokens(48)))
    check_eviction(KeyDiff(budget=SquareRoot(factor=4)))
    print("the three policies and the budget keep the contract")

    dense = run(CachePipeline(window=32))
    ours = CachePipeline(
        admission=Strided(),
        selection=MeanKey(budget=Tokens(64)),
        eviction=KeyDiff(budget=Tokens(96)),
        window=32,
    )
    report = run(ours)
    print(f"tokens seen        {report.tokens}")
    print(f"admitted           {report.mean_admitted:.0%}")
    print(f"evicted per head   {report.evicted}")
    print(f"stored per head    {report.stored}")
    print(f"read per token     {report.mean_read:.0f} (dense {dense.mean_read:.0f})")
    print(f"bytes of K and V   {report.kv} (dense {dense.kv})")


if __name__ == "__main__":
    main()
