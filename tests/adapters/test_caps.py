"""Caps through attach: batches, chunks, drafts that are taken back, captured decoding."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import AdmitAll, CachePipeline, CapacityError, SnapKV, Tokens
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import prompt, tiny

WINDOW, CAP = 8, 24
# Its own budget never asks for an eviction.
PIPELINE = CachePipeline(
    admission=AdmitAll(), eviction=SnapKV(budget=Tokens(1000), observation=4), window=WINDOW
)
CAPPED = {"max_tokens": CAP, "at_cap": "evict", "page_size": 4, "interval": 4}


def longest(cache):
    state = cache.state
    return max(
        len(state.kept(layer, row, head))
        for layer in range(state.spec.layers)
        for row in range(state.batch)
        for head in range(state.spec.kv_heads)
    )


@pytest.mark.parametrize("extra", [{}, {"prefill_chunk_size": 7}], ids=["whole", "chunks"])
def test_generate_stays_below_the_token_cap(llama, extra):
    with attach(llama, PIPELINE, **CAPPED) as attachment:
        cache = attachment.new_cache()
        inputs = prompt([40] if extra else [40, 13])
        llama.generate(**inputs, past_key_values=cache, max_new_tokens=30, do_sample=False, **extra)
    report = cache.report()
    assert longest(cache) <= CAP
    assert report.cap_evicted > 0
    assert 0 < report.overshoot <= (7 if extra else 40 - CAP)


def test_a_cap_without_eviction_ends_generate_and_keeps_the_cache(llama):
    with attach(llama, CachePipeline(window=WINDOW), max_tokens=CAP) as attachment:
        cache = attachment.new_cache()
        with pytest.raises(CapacityError, match="max_tokens"):
            llama.generate(
                **prompt([20]), past_key_values=cache, max_new_tokens=30, do_sample=False
            )
    assert cache.state.lengths == [CAP]
    assert cache.state.call is None


def test_drafts_at_the_cap(llama):
    draft = tiny(seed=5, layers=1)
    with attach(llama, PIPELINE, **CAPPED) as attachment:
        cache = attachment.new_cache()
        llama.generate(
            **prompt([40]),
            past_key_values=cache,
            assistant_model=draft,
            max_new_tokens=20,
            do_sample=False,
        )
    assert longest(cache) <= CAP
    assert cache.report().cap_evicted > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_decoding_at_the_cap_equals_eager(llama, monkeypatch):
    from kvpolicy.adapters.hf import capture

    llama = llama.cuda()
    inputs = {n: x.cuda() for n, x in prompt([40, 13]).items()}
    found = []
    for reason in (None, "asked for"):
        with monkeypatch.context() as patch:
            if reason:
                patch.setattr(capture, "why_not", lambda *_: "asked for")
            with attach(llama, PIPELINE, **CAPPED) as attachment:
                cache = attachment.new_cache()
                found.append(
                    llama.generate(
                        **inputs, past_key_values=cache, max_new_tokens=40, do_sample=False
                    )
                )
        assert longest(cache) <= CAP
        assert cache.report().cap_evicted > 0
    assert torch.equal(*found)
