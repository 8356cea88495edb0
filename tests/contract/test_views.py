"""What an eviction is shown of a cache, against the tokens that went in."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, RandomGate, Tokens
from kvpolicy.eviction import Eviction
from tests.support.contract.driver import Run, feed, stream

SPEC = CacheSpec(
    layers=2, heads=4, kv_heads=2, head_dim=8, page_size=4, interval=4, dtype=torch.float32
)
WINDOW, QUERIES, LENGTHS = 6, 9, [19, 3]
STREAMS = [stream(SPEC, n + 12, n) for n in LENGTHS]
SHOWN: list[tuple[int, ...]] = []


@attrs.frozen
class Watching(Eviction):
    """Compares what it is shown, layer by layer, and keeps the latest tokens."""

    budget: Tokens = Tokens(12)
    when: str = "decode"
    queries: int = QUERIES

    def score(self, view):
        for row, length in enumerate(view.lengths.tolist()):
            compare(view, row, length, STREAMS[row][view.layer])
        SHOWN.append((*view.lengths.tolist(), int(view.valid.sum())))
        return view.positions.float()


def ending_at(tokens, length, count):
    """The last `count` of `length` tokens `[H, count, D]`, zeros before the first; which are."""
    at = torch.arange(length - count, length)
    return tokens[:, at.clamp(min=0)] * (at >= 0)[:, None], at >= 0


def compare(view, row, length, tokens):
    q, k, v, _ = tokens
    near, is_near = ending_at(k, length, WINDOW)
    assert torch.equal(view.recent_keys[row].cpu(), near)
    assert torch.equal(view.recent_valid[row].cpu(), is_near)
    asked, is_asked = ending_at(q, length, QUERIES)
    assert torch.equal(view.query_valid[row].cpu(), is_asked)
    assert torch.equal(view.queries[row].cpu()[:, is_asked], asked[:, is_asked])
    for head in range(SPEC.kv_heads):
        valid = view.valid[row, head].cpu()
        at = view.positions[row, head].cpu()[valid].long()
        assert (at.diff() > 0).all() and (at < length - WINDOW).all()
        assert torch.equal(view.keys[row, head].cpu()[valid], k[head, at])
        assert torch.equal(view.values[row, head].cpu()[valid], v[head, at])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_eviction_sees_the_tokens_that_went_in(backend, device):
    spec = attrs.evolve(SPEC, device=torch.device("cpu") if backend == "reference" else device)
    pipeline = CachePipeline(
        admission=RandomGate(sparsity=0.3), eviction=Watching(), window=WINDOW, backend=backend
    )
    run = Run(pipeline, spec, STREAMS, oracle=False)
    SHOWN.clear()
    feed(run, LENGTHS, 3, 11)
    for _ in range(5):
        run.decode()
    assert len({shown[:-1] for shown in SHOWN}) >= 2  # when prompts ended, and after four tokens
    assert all(held > 0 for *_, held in SHOWN)
