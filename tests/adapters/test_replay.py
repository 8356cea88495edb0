"""Replays on models: what they give a context's tokens, against transformers' own attention."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import (
    AcrossLayers,
    CachePipeline,
    KVzip,
    PhaseError,
    SnapKV,
    Tokens,
    UnsupportedError,
)
from kvpolicy.adapters.hf import attach, repeats
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, prompt

WINDOW, SINKS, KEPT = 4, 2, 17
CONTEXT = prompt([37])["input_ids"]
PARTS = [(prompt([9], seed=3)["input_ids"], range(SINKS, 20)), (CONTEXT[:, 20:], range(20, 37))]


def scores_of(model, parts):
    """KVzip's scores `[layer][Hkv, N]` from weights over the keys that its softmax is over."""
    found = None
    for ids, span in parts:
        both = torch.cat([CONTEXT, ids], 1)
        attention = model(both, output_attentions=True).attentions
        length, j = CONTEXT.shape[1], torch.arange(both.shape[1])
        looked = (j >= span.start) & (j < span.stop)
        seen = looked | (j < SINKS) | (j >= length)
        weights = [x[0, :, length:].double() * seen for x in attention]
        weights = [x / x.sum(-1, keepdim=True) * looked for x in weights]
        heads = model.config.num_key_value_heads
        most = [x.unflatten(0, (heads, -1)).amax((1, 2))[:, :length] for x in weights]
        found = (
            most if found is None else [torch.maximum(*x) for x in zip(found, most, strict=True)]
        )
    return found


def test_kvzip_keeps_what_the_original_does(llama):
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        scores = scores_of(llama, PARTS)
    pipeline = CachePipeline(eviction=KVzip(budget=Tokens(KEPT), sinks=SINKS), window=WINDOW)
    with attach(llama, pipeline, **SIZES) as attached, torch.no_grad():
        cache = attached.new_cache()
        llama(CONTEXT, past_key_values=cache)
        before = digest(cache)
        for ids, span in PARTS:
            attached.replay(cache, ids, span=span, sinks=SINKS)
        assert digest(cache) == before
        cache.end_prompt()
        length = CONTEXT.shape[1]
        for layer, wanted in enumerate(scores):
            wanted[:, :SINKS] = 2.0
            best = wanted[:, : length - WINDOW].topk(KEPT - WINDOW).indices
            for head, chosen in enumerate(best.tolist()):
                recent = list(range(length - WINDOW, length))
                assert cache.state.kept(layer, 0, head).tolist() == sorted(chosen) + recent
        llama(CONTEXT[:, :1], past_key_values=cache)


def test_kvzip_shares_its_budget_among_all_heads_as_the_original_does(llama):
    """snu-mllab/KVzip, _threshold: one ranking of all layers. Without a window but the newest."""
    llama.set_attn_implementation("eager")
    with torch.no_grad():
        scores = torch.stack(scores_of(llama, PARTS))[..., :-1]
    scores[..., :SINKS] = 2.0
    best = scores.flatten().topk(scores[..., 0].numel() * (KEPT - 1)).indices
    wanted = torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, best, True)
    wanted = wanted.view_as(scores)
    assert len({int(n) for n in wanted.sum(-1).flatten()}) > 1
    budget = AcrossLayers(Tokens(KEPT), floor=0)
    pipeline = CachePipeline(eviction=KVzip(budget=budget, sinks=SINKS))
    with attach(llama, pipeline, **SIZES) as attached, torch.no_grad():
        cache = attached.new_cache()
        llama(CONTEXT, past_key_values=cache)
        for ids, span in PARTS:
            attached.replay(cache, ids, span=span, sinks=SINKS)
        cache.end_prompt()
        for layer, heads in enumerate(wanted):
            for head, of_head in enumerate(heads):
                held = [*of_head.nonzero()[:, 0].tolist(), CONTEXT.shape[1] - 1]
                assert cache.state.kept(layer, 0, head).tolist() == held


def test_the_end_of_a_prompt_without_a_replay_says_what_to_do(llama):
    with attach(llama, CachePipeline(eviction=KVzip(budget=8), window=4)) as attached:
        with pytest.raises(PhaseError, match="KVzip: its numbers come from a replay"):
            attached.read(CONTEXT)
        cache = attached.new_cache()
        with pytest.raises(PhaseError, match="replay: wanted a cache whose prompt"):
            attached.replay(cache, CONTEXT)
    with attach(llama, CachePipeline(eviction=SnapKV(budget=40))) as attached:
        cache = attached.new_cache()
        llama(CONTEXT, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="SnapKV does not look at replays"):
            attached.replay(cache, CONTEXT)


class Words:
    """A tokenizer of as many tokens as there are words."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [90 + n for n, _ in enumerate(text.split())]


def test_repeats():
    context = torch.arange(25)[None]
    found = repeats(Words(), context, chunk_size=10, prefix=3, previous=2, suffix="a b")
    assert [x.span for x in found] == [range(3, 13), range(13, 23), range(23, 25)]
    assert found[0].ids.tolist() == [[90, 91, 92, 93, 94, 90, 91, *range(3, 13)]]
    assert found[2].ids.tolist() == [[*range(90, 100), 21, 22, 90, 91, 23, 24]]
