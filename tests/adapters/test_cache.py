"""The cache as transformers and bare loops use it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache

from kvpolicy import CachePipeline, PhaseError, RollbackError, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)


@pytest.fixture
def attached(llama):
    with attach(llama, PIPELINE, **SIZES) as attachment:
        yield attachment


def run(model, cache, ids):
    return model(input_ids=ids, past_key_values=cache).logits[:, -1]


REFUSED = {"offload", "prefetch"}
TESTED = {  # by what they do, here and in tests of beams, assistants, forks and states
    "activate_past_recording", "batch_repeat_interleave", "batch_select_indices", "crop",
    "get_conv_state", "get_recurrent_state", "reorder_cache", "reset", "update",
    "update_conv_state", "update_indexer", "update_recurrent_state",
}  # fmt: skip
ARGUMENTS = {
    "early_initialization": (2, 2, 16, torch.float32, torch.device("cpu")),
    "get_mask_sizes": (3, 0),
    "get_query_offset": (0,),
    "has_previous_state": (0,),
    "is_recording_past": (0,),
    "offload": (0,),
    "prefetch": (0,),
}


def said(cache, name):
    """What an attribute is, or what the method answers or raises."""
    found = getattr(cache, name)
    try:
        return found(*ARGUMENTS.get(name, ())) if callable(found) else found
    except ValueError as error:
        return type(error)


def test_it_answers_as_a_cache_of_transformers(llama):
    """Every public name of transformers' Cache: as DynamicCache has it, or refused by name."""
    ids = prompt([9, 9])["input_ids"]
    empty, full = (DynamicCache(config=llama.config) for _ in range(2))
    with torch.no_grad():
        llama(ids, past_key_values=full)
    names = {name for name in dir(Cache) if not name.startswith("_")} - TESTED - REFUSED
    with attach(llama, PIPELINE, **SIZES) as attached:
        for plain, cache in ((empty, attached.new_cache()), (full, attached.read(ids))):
            for name in sorted(names, key=ARGUMENTS.__contains__):  # which may initialise it
                assert said(cache, name) == said(plain, name), name
            for name in REFUSED:
                with pytest.raises(UnsupportedError, match=f"^{name}: pages"):
                    said(cache, name)
            with pytest.raises(UnsupportedError, match="^iteration: .* cache.state.kept"):
                list(cache)
    assert len(list(full)[0]) >= 2


def test_crop_conventions(attached):
    model, ids = attached.model, prompt([20])["input_ids"]
    wanted = run(model, attached.new_cache(), ids[:, :16])
    for cut in (-5, torch.tensor(-5), torch.tensor(15), 15):
        cache = attached.new_cache()
        run(model, cache, ids)
        cache.crop(0)
        assert cache.get_seq_length() == 20
        cache.crop(cut)
        assert cache.get_seq_length() == 15
        assert cache.state.lengths == [15]
        assert torch.allclose(run(model, cache, ids[:, 15:16]), wanted, atol=1e-4)
    cache.crop(99)
    assert cache.get_seq_length() == 16
    with pytest.raises(RollbackError, match="16 columns, cannot drop 17"):
        cache.crop(-17)


def test_crop_counts_real_tokens(attached):
    cache = attached.new_cache()
    inputs = prompt([12, 10], side="right")
    attached.model(**inputs, past_key_values=cache)
    cache.end_prompt()
    cache.state.finish([1])
    attached.model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    assert cache.state.lengths == [13, 10]
    cache.crop(-2)
    assert cache.state.lengths == [11, 10] and cache.columns == 11
    cache.crop(-1)
    assert cache.state.lengths == [10, 10]


def test_crop_across_an_eviction(llama):
    pipeline = pipelines()["snapkv"]
    with attach(llama, pipeline, **SIZES) as attachment:
        cache = attachment.new_cache()
        llama.generate(**prompt([33]), past_key_values=cache, max_new_tokens=4)
        cache.crop(-3)
        with pytest.raises(RollbackError, match="eviction"):
            cache.crop(-1)
        assert cache.columns == 33


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda cache: cache.fork()])
@pytest.mark.parametrize("name", ["striped", "all"])
def test_copies_go_their_own_way(llama, name, copies):
    pipeline, inputs = pipelines()[name], prompt([33, 21])
    options = {"max_new_tokens": 12, "do_sample": False}
    with attach(llama, pipeline, **SIZES) as attachment:
        cache = attachment.new_cache()
        first = llama.generate(**inputs, past_key_values=cache, **options)
        twin = copies(cache)
        for seed, ours in ((2, twin), (3, cache)):
            more = prompt([6, 6], seed=seed)["input_ids"]
            ids = torch.cat([first, more], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 18, dtype=torch.long)], 1)
            whole = {"input_ids": ids, "attention_mask": mask, **options}
            fresh = attachment.new_cache()
            llama.generate(**inputs, past_key_values=fresh, **options)
            wanted = llama.generate(**whole, past_key_values=fresh)
            assert torch.equal(llama.generate(**whole, past_key_values=ours), wanted)


def test_rows(attached):
    model, inputs = attached.model, prompt([20, 14, 9])
    cache = attached.new_cache()
    model(**inputs, past_key_values=cache)
    token = torch.tensor([[7], [8]])
    alone = []
    for row, n in ((2, 9), (0, 20)):
        mine = attached.new_cache()
        run(model, mine, inputs["input_ids"][row : row + 1, 20 - n :])
        alone.append(run(model, mine, token[:1] if row == 2 else token[1:]))
    for pick in (
        lambda c: c.fork([2, 0]),
        lambda c: (c.batch_select_indices(torch.tensor([2, 0])), c)[1],
    ):
        picked = pick(cache)
        assert picked.state.batch == 2
        assert torch.allclose(run(model, picked, token), torch.cat(alone), atol=1e-4)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.state.lengths == [21, 21]
    cache.batch_repeat_interleave(2)
    assert cache.state.lengths == [21] * 4
    assert cache.get_seq_length() == 21


def test_another_batch(attached):
    cache = attached.new_cache()
    run(attached.model, cache, prompt([9, 9])["input_ids"])
    with pytest.raises(ValueError, match="holds 2 sequences, got a batch of 3"):
        run(attached.model, cache, prompt([9, 9, 9])["input_ids"])
    cache.reset()
    assert cache.get_seq_length() == 0
    run(attached.model, cache, prompt([9, 9, 9])["input_ids"])
    assert cache.state.batch == 3
    cache.reset()
    options = {"max_new_tokens": 3, "do_sample": False}
    wanted = attached.model.generate(**prompt([9, 7]), **options)
    again = attached.model.generate(**prompt([9, 7]), **options, past_key_values=cache)
    assert torch.equal(again, wanted) and cache.state.batch == 2


def test_report_before_anything(attached):
    with pytest.raises(PhaseError, match="nothing went through"):
        attached.new_cache().report()


@pytest.mark.parametrize("name", ["quest", "snapkv", "all"])
def test_bare_loop(llama, name):
    """end_prompt and begin_prompt name the phases; the result is generate's."""
    pipeline, inputs = pipelines()[name], prompt([33])
    options = {"do_sample": False, "max_new_tokens": 14}
    with attach(llama, pipeline, **SIZES) as attachment:
        wanted = llama.generate(**inputs, past_key_values=attachment.new_cache(), **options)
        cache = attachment.new_cache()
        token = run(llama, cache, inputs["input_ids"]).argmax(-1)
        cache.end_prompt()
        found = [token]
        for _ in range(13):
            token = run(llama, cache, token[:, None]).argmax(-1)
            found.append(token)
    assert torch.cat(found).tolist() == wanted[0, 33:].tolist()


def test_bare_loop_counts_real_positions(qwen3):
    """Padding between turns leaves no hole in the position ids that a bare loop does not give."""
    with attach(qwen3, PIPELINE, **SIZES) as attachment:
        cache, alone = attachment.new_cache(), attachment.new_cache()
        first, second = prompt([9, 5]), prompt([4, 2], seed=2)
        qwen3(**first, past_key_values=cache)
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        out = qwen3(second["input_ids"], mask, past_key_values=cache).logits
        ids = torch.cat([first["input_ids"][1, 4:], second["input_ids"][1, 2:]])[None]
        wanted = qwen3(ids, past_key_values=alone).logits
        for layer in range(2):
            rings = [
                c.state.layers[layer].ring.k[row, :, :7] for c, row in ((cache, 1), (alone, 0))
            ]
            assert torch.allclose(*rings, atol=1e-5)
    assert torch.allclose(out[1, -1], wanted[0, -1], atol=1e-4)


def test_half_precision():
    model = tiny().to(torch.bfloat16)
    ids = prompt([20])["input_ids"]
    exact = copy.deepcopy(model).double()(ids).logits
    eager = (model(ids).logits.double() - exact).abs().max()
    with attach(model, PIPELINE) as attachment:
        ours = (model(ids, past_key_values=attachment.new_cache()).logits.double() - exact).abs()
    assert ours.max() < 2 * eager
