"""Pipelines that leave something out, against a dense model whose attention is the oracle."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, LocalAttention, UnsupportedError
from kvpolicy.adapters.hf import attach, new_cache
from tests.support.adapters.dense import Dense, follow
from tests.support.adapters.models import SIZES, error, gate, pipelines, prompt, tiny

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def check(model, pipeline, inputs, out, cache, tolerance=2e-3):
    """Each row of `out` equals the dense model's run of that row alone; the kept sets are equal."""
    width = inputs["input_ids"].shape[1]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        dense = Dense(model, pipeline, **SIZES)
        tokens = out.sequences[row, width:]
        wanted = follow(dense, inputs["input_ids"][row, mask], tokens)
        found = torch.stack([x[row] for x in out.logits])
        assert (found - wanted).abs().max() < tolerance
        assert tokens.tolist() == wanted.argmax(-1).tolist()
        for layer in range(2):
            for head in range(2):
                assert cache.state.kept(layer, row, head).tolist() == dense.kept(layer, head)


@pytest.mark.parametrize("name", pipelines())
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2-sliding", "qwen3"])
def test_padded_batch(kind, name):
    model, pipeline = tiny(kind), pipelines()[name]
    inputs = prompt([33, 21])
    cache = new_cache(model, pipeline, **SIZES)
    with attach(model, pipeline):
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=14, **GREEDY)
    check(model, pipeline, inputs, out, cache)
    report = cache.report()
    if kind != "mistral":
        assert sum(map(sum, report.stored)) < 4 * (33 + 21 + 26) / 2 or "quest" in name
        assert ("snapkv" not in name and name != "all") or sum(map(sum, report.evicted)) > 0


@pytest.mark.parametrize("name", pipelines())
def test_chunked_prefill(llama, name):
    pipeline, inputs = pipelines()[name], prompt([33, 21])
    cache = new_cache(llama, pipeline, **SIZES)
    with attach(llama, pipeline):
        out = llama.generate(
            **inputs, past_key_values=cache, max_new_tokens=6, prefill_chunk_size=7, **GREEDY
        )
    check(llama, pipeline, inputs, out, cache)


def test_effect(llama):
    inputs = prompt([33])
    plain = llama.generate(**inputs, max_new_tokens=4, **GREEDY)
    with attach(llama, CachePipeline(admission=LocalAttention(window=5))):
        out = llama.generate(**inputs, max_new_tokens=4, **GREEDY)
    assert (out.logits[0] - plain.logits[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_pre_rope_keys_are_exact(kind, monkeypatch):
    model, seen = tiny(kind), []
    pipeline = CachePipeline(admission=gate())
    wanted = []
    for layer in model.model.layers:
        attention = layer.self_attn
        source = attention.k_norm if kind == "qwen3" else attention.k_proj
        source.register_forward_hook(
            lambda m, a, out: wanted.append(out.view(-1, 2, 16).transpose(0, 1).clone())
        )
    admit = type(gate()).admit

    def spy(self, write):
        seen.append(write.key_pre)
        return admit(self, write)

    monkeypatch.setattr(type(gate()), "admit", spy)
    with attach(model, pipeline):
        model.generate(**prompt([20]), max_new_tokens=3, do_sample=False)
    assert len(seen) == len(wanted) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("name", ["striped", "gate"])
def test_turns_equal_a_fresh_run(model, name):
    """Without selection and eviction, and whatever lies between turns."""
    pipeline = pipelines()[name]
    inputs, more = prompt([19, 12]), prompt([9, 4], seed=2)
    cache = new_cache(model, pipeline, **SIZES)
    with attach(model, pipeline, **SIZES):
        first = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, **GREEDY)
        ids = torch.cat([first.sequences, more["input_ids"]], 1)
        said = torch.ones(2, 5, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], said, more["attention_mask"]], 1)
        both = {"input_ids": ids, "attention_mask": mask}
        second = model.generate(**both, past_key_values=cache, max_new_tokens=8, **GREEDY)
        fresh = new_cache(model, pipeline, **SIZES)
        once = model.generate(**both, past_key_values=fresh, max_new_tokens=8, **GREEDY)
    assert torch.equal(second.sequences, once.sequences)
    assert error(second, once) < 1e-4
    for layer in range(2):
        for row in range(2):
            for head in range(2):
                kept = [c.state.kept(layer, row, head).tolist() for c in (cache, fresh)]
                assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["snapkv", "all"])
def test_turns_after_eviction(llama, name):
    pipeline, inputs = pipelines()[name], prompt([33])
    more = prompt([7], seed=2)["input_ids"]
    cache = new_cache(llama, pipeline, **SIZES)
    dense = Dense(llama, pipeline, **SIZES)
    with attach(llama, pipeline):
        first = llama.generate(**inputs, past_key_values=cache, max_new_tokens=12, **GREEDY)
        assert cache.get_seq_length() == 33 + 11
        assert len(cache.state.kept(0, 0, 0)) < 33 + 11
        ids = torch.cat([first.sequences, more], 1)
        out = llama.generate(ids, past_key_values=cache, max_new_tokens=6, **GREEDY)
    follow(dense, inputs["input_ids"][0], first.sequences[0, 33:])
    wanted = follow(dense, ids[0, 44:], out.sequences[0, ids.shape[1] :])
    assert (torch.cat(out.logits) - wanted).abs().max() < 2e-3
    assert cache.get_seq_length() == ids.shape[1] + 5
    assert cache.state.kept(0, 0, 0).tolist() == dense.kept(0, 0)


def test_a_turn_after_ended_rows(llama):
    """Columns of ended rows are padding; a mask that shows them is refused by name."""
    inputs, more = prompt([12, 12]), prompt([6, 6], seed=2)["input_ids"]
    free = llama.generate(**inputs, max_new_tokens=9, do_sample=False)
    end = int(free[0, 12 + 3])
    pipeline = CachePipeline(window=5)
    cache = new_cache(llama, pipeline, **SIZES)
    with attach(llama, pipeline):
        first = llama.generate(
            **inputs, past_key_values=cache, max_new_tokens=9, do_sample=False, eos_token_id=end
        )
        ids = torch.cat([first, more], 1)
        mask = torch.ones_like(ids)
        mask[0, 20] = 0  # sampled last and not yet fed
        both = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6}
        with pytest.raises(UnsupportedError, match="shows columns that the cache does not hold"):
            llama.generate(**both, past_key_values=cache, do_sample=False)
        mask[:, :20] = cache.real()
        out = llama.generate(**both, past_key_values=cache, do_sample=False)
    spoken = first[0].tolist().index(end, 12) + 1
    alone = torch.cat([ids[:1, :spoken], more[:1]], 1)
    plain = llama.generate(alone, max_new_tokens=6, do_sample=False)
    assert out[0, -6:].tolist() == plain[0, -6:].tolist()
    assert cache.state.lengths[0] == alone.shape[1] + 5


def test_ended_rows_store_nothing(llama):
    inputs = prompt([12, 12])
    free = llama.generate(**inputs, max_new_tokens=12, do_sample=False)
    end = int(free[0, 12 + 3])
    assert end not in free[1, 12:].tolist()
    pipeline = CachePipeline(window=5)
    cache = new_cache(llama, pipeline, **SIZES)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end}
    with attach(llama, pipeline):
        out = llama.generate(**inputs, past_key_values=cache, **options)
    assert torch.equal(out, llama.generate(**inputs, **options))
    # The end token itself is stored, as another turn would find it in the prompt.
    assert cache.state.lengths == [12 + free[0, 12:].tolist().index(end) + 1, 12 + 11]
    assert len(cache.state.kept(0, 0, 0)) == cache.state.lengths[0]
