"""Sums of attention over a model's generation: what is refused or taken back never counted."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import H2O, CachePipeline
from kvpolicy.adapters.hf import attach
from kvpolicy.calls.settle import seen
from tests.support.adapters.models import SIZES, prompt

CONTEXT = prompt([30])["input_ids"]
CONTEXT = torch.cat([CONTEXT, CONTEXT[:, 5:25]], 1)  # candidates are found in it


def numbers(cache):
    """What an eviction would see of each head's tokens, in order."""
    found = []
    for layer in cache.state.layers:
        held, near = seen(cache.state, layer)
        end = cache.state.lengths[0]
        at = torch.arange(end - layer.window, end) % layer.ring.slots
        for head, count in enumerate(layer.counts[0].tolist()):
            found.append(torch.cat([held[0, head, :count], near[0, head, at]]))
    return found


@pytest.mark.parametrize("when", ["prompt_end", "decode"])
def test_candidates_that_are_refused_were_never_counted(llama, when):
    pipeline = CachePipeline(eviction=H2O(budget=24, when=when), window=5)
    options = {"max_new_tokens": 17, "do_sample": False, "return_dict_in_generate": True}
    with attach(llama, pipeline, **{**SIZES, "interval": 64}) as attached:
        plain = llama.generate(CONTEXT, **options)
        calls = []
        llama.model.register_forward_hook(lambda *a: calls.append(1))
        assisted = llama.generate(CONTEXT, **options, prompt_lookup_num_tokens=3)
        assert len(calls) > 2 and attached.last_report().numbers > 0
    assert torch.equal(plain.sequences, assisted.sequences)
    one, other = (numbers(x.past_key_values) for x in (plain, assisted))
    short = min(x.past_key_values.state.lengths[0] for x in (plain, assisted))
    assert short == max(x.past_key_values.state.lengths[0] for x in (plain, assisted))
    for a, b in zip(one, other, strict=True):
        assert a.abs().max() > 1  # tokens that gathered more than one query's whole weight
        assert torch.allclose(a, b, atol=1e-5)
