"""Caches and pipelines outside their attachment: after it, in a next one, beside a second one."""

from __future__ import annotations

import copy

import pytest
import torch

from kvpolicy import CachePipeline, PhaseError
from kvpolicy.adapters.hf import attach, detach, new_cache
from tests.support.adapters.faults import digest, snapshot
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

GREEDY = {"do_sample": False, "max_new_tokens": 8}
ALL = pipelines()["all"]


def halves(model, pipeline=ALL, between=lambda cache: None):
    """Two turns with one cache, each inside its own attachment."""
    inputs, more = prompt([33]), prompt([7], seed=2)["input_ids"]
    with attach(model, pipeline, **SIZES) as attached:
        cache = attached.new_cache()
        first = model.generate(**inputs, past_key_values=cache, **GREEDY)
    between(cache)
    ids = torch.cat([first, more], 1)
    with attach(model, pipeline, **SIZES):
        return model.generate(ids, past_key_values=cache, **GREEDY), cache


def test_an_attachment_is_entered_while_it_lasts(llama):
    with attach(llama, ALL, **SIZES) as attached, attached:
        pass
    assert not attached.attached
    with pytest.raises(PhaseError, match="attach: this attachment was detached"), attached:
        pass


def test_a_shallow_copy_outlives_the_attachment():
    """It keeps our generate, which says so; forwards are its own."""
    model, inputs = tiny(), prompt([33])
    wanted = model(**inputs).logits
    with attach(model, ALL, **SIZES):
        other = copy.copy(model)
    with pytest.raises(PhaseError, match="generate: it belongs to .* copy before attaching"):
        other.generate(**inputs, **GREEDY)
    assert torch.equal(other(**inputs).logits, wanted)


def test_a_cache_outlives_its_attachment(llama):
    """What is refused in between leaves no trace; a next attachment goes on with the cache."""

    def refused(cache):
        before = digest(cache)
        for run, options in ((llama.generate, {"max_new_tokens": 3}), (llama, {})):
            with pytest.raises(PhaseError, match=r"inside attach\(model, pipeline\)"):
                run(prompt([60])["input_ids"], past_key_values=cache, **options)
        assert digest(cache) == before
        assert cache.report().tokens == cache.state.lengths[0]

    wanted, untouched = halves(llama)
    found, cache = halves(llama, between=refused)
    assert torch.equal(found, wanted)
    assert digest(cache) == digest(untouched)


def test_a_pipeline_serves_many_models_one_after_the_other(llama, qwen3):
    """The frozen value holds nothing of the model it was attached to."""
    alone = [halves(copy.deepcopy(model), pipelines()["all"])[0] for model in (llama, qwen3)]
    for model, wanted in zip((llama, qwen3), alone, strict=True):
        assert torch.equal(halves(model)[0], wanted)
    with attach(llama, ALL, **SIZES), attach(qwen3, ALL, **SIZES):
        pass


def test_what_is_left_of_an_attachment(llama):
    """Its caches and report stay; its generate, if kept, is refused without the attention."""
    plain = llama.generate(**prompt([9]), **GREEDY)
    attached = attach(llama, ALL, **SIZES)
    kept, cache = llama.generate, attached.new_cache()
    kept(**prompt([33]), past_key_values=cache, **GREEDY)
    attached.detach()
    with pytest.raises(PhaseError, match=r"inside attach\(model, pipeline\)"):
        kept(**prompt([9]), **GREEDY)
    assert torch.equal(llama.generate(**prompt([9]), **GREEDY), plain)
    assert cache.report().tokens == 33 + 7
    assert attached.new_cache().state is None


def test_attaching_twice(llama):
    """The second is refused whatever its pipeline, and the first goes on as if nothing was."""
    wanted, _ = halves(copy.deepcopy(llama))
    with attach(llama, ALL, **SIZES) as first:
        inside = snapshot(llama)
        for pipeline in (ALL, CachePipeline(window=5)):
            with pytest.raises(PhaseError, match="attached already; detach it first"):
                attach(llama, pipeline)
        assert snapshot(llama) == inside
    assert torch.equal(halves(llama)[0], wanted)
    first.detach()
    with pytest.raises(PhaseError, match="no pipeline is attached"):
        detach(llama)


@pytest.mark.parametrize("where", ["generate", "forward"])
def test_an_old_attachment_does_not_take_the_new_one_off(llama, where):
    old = attach(llama, CachePipeline(window=6))
    old.detach()
    with attach(llama, ALL, **SIZES) as new:
        old.detach()
        cache = new.new_cache()
        run = llama if where == "forward" else llama.generate
        run(**prompt([9]), past_key_values=cache, **({} if where == "forward" else GREEDY))
        assert cache.state.lengths[0] >= 9


def test_a_cache_of_another_pipeline_or_shape_is_refused_unchanged(llama):
    with attach(llama, ALL, **SIZES) as attached:
        cache = attached.new_cache()
        llama.generate(**prompt([33]), past_key_values=cache, **GREEDY)
    before = digest(cache)
    with attach(llama, CachePipeline(window=5)):
        for run in (llama, llama.generate):
            with pytest.raises(ValueError, match="belongs to another pipeline"):
                run(prompt([3])["input_ids"], past_key_values=cache)
    other = tiny(layers=3)
    with attach(other, ALL, **SIZES), pytest.raises(ValueError, match="made for another model"):
        other(prompt([3])["input_ids"], past_key_values=cache)
    assert digest(cache) == before
    # An equal pipeline is as good as the same one.
    with attach(llama, pipelines()["all"], **SIZES):
        llama.generate(
            torch.cat([prompt([33])["input_ids"], prompt([12], seed=4)["input_ids"]], 1),
            past_key_values=cache,
            **GREEDY,
        )


def test_a_cache_whose_model_is_gone(tmp_path):
    model = tiny()
    with attach(model, ALL, **SIZES):
        cache = new_cache(model, ALL, **SIZES)
        model.generate(**prompt([33]), past_key_values=cache, **GREEDY)
    del model
    assert cache.report().tokens == 33 + 7
    with pytest.raises(PhaseError, match="its model is gone"):
        cache.save(tmp_path / "cache")
    twin = tiny()
    with attach(twin, ALL, **SIZES):
        twin(prompt([3])["input_ids"], past_key_values=cache.fork())
