"""Saving a cache between two turns and going on in another process's place."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import PhaseError
from kvpolicy.adapters.hf import attach, load_cache, new_cache
from kvpolicy.adapters.hf.fingerprints import model_fingerprint
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

OPTIONS = {
    "do_sample": False,
    "max_new_tokens": 12,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.mark.parametrize("name", ["striped", "gate", "quest", "all", "gate-quest-snapkv"])
@pytest.mark.parametrize("kind", ["llama", "qwen2-sliding"])
def test_the_next_turn_is_the_same(tmp_path, kind, name):
    model, pipeline, inputs = tiny(kind), pipelines()[name], prompt([33, 21])
    with attach(model, pipeline, **SIZES) as attachment:
        cache = attachment.new_cache()
        first = model.generate(**inputs, past_key_values=cache, **OPTIONS).sequences
        cache.save(tmp_path / "cache")
        other = load_cache(tiny(kind), pipelines()[name], tmp_path / "cache", **SIZES)
        assert other.columns == cache.columns == 33 + 11
        more = torch.cat([first, prompt([7, 7], seed=4)["input_ids"]], 1)
        mask = torch.ones_like(more)
        mask[:, :33] = inputs["attention_mask"]
        inputs = {"input_ids": more, "attention_mask": mask}
        wanted = model.generate(**inputs, past_key_values=cache, **OPTIONS)
    with attach(model, other.pipeline, **SIZES):
        out = model.generate(**inputs, past_key_values=other, **OPTIONS)
    assert torch.equal(out.sequences, wanted.sequences)
    for pair in zip(out.logits, wanted.logits, strict=True):
        assert torch.equal(*pair)
    assert cache.report().evicted == other.report().evicted
    assert other.columns == cache.columns


def test_a_bare_loop_goes_on(tmp_path):
    model, pipeline = tiny(), pipelines()["all"]
    with attach(model, pipeline, **SIZES) as attachment:
        cache = attachment.new_cache()
        model(**prompt([20]), past_key_values=cache)
        cache.end_prompt()
        cache.save(tmp_path / "cache")
        other = load_cache(model, pipeline, tmp_path / "cache", **SIZES)
        ids = prompt([1], seed=3)["input_ids"]
        logits = [model(ids, past_key_values=c).logits for c in (cache, other)]
    assert torch.equal(*logits)


def test_refusals(tmp_path):
    model, pipeline = tiny(), pipelines()["quest"]
    with attach(model, pipeline, **SIZES) as attachment:
        cache = attachment.new_cache()
        with pytest.raises(PhaseError, match="nothing went through"):
            cache.save(tmp_path / "cache")
        model(**prompt([20]), past_key_values=cache)
        cache.save(tmp_path / "cache")
    load_cache(model, pipeline, tmp_path / "cache", **SIZES)
    with pytest.raises(ValueError, match="model: .*other weights"):
        load_cache(tiny(seed=1), pipeline, tmp_path / "cache", **SIZES)
    with pytest.raises(ValueError, match="model: .*another model"):
        load_cache(tiny("qwen2"), pipeline, tmp_path / "cache", **SIZES)
    with pytest.raises(ValueError, match="pipeline: .*other policies"):
        load_cache(model, pipelines()["snapkv"], tmp_path / "cache", **SIZES)
    with pytest.raises(ValueError, match="page_size: the cache was saved with 4, got 16"):
        load_cache(model, pipeline, tmp_path / "cache")
    del model, attachment
    cache.model = lambda: None
    with pytest.raises(PhaseError, match="its model is gone"):
        cache.save(tmp_path / "cache")


def test_the_fingerprint_sees_every_parameter():
    model = tiny()
    found = {model_fingerprint(model)}
    with attach(model, pipelines()["quest"]):
        assert model_fingerprint(model) in found
    with torch.no_grad():
        for parameter in model.get_decoder().parameters():
            before = parameter.clone()
            parameter.mul_(1.01)
            found.add(model_fingerprint(model))
            parameter.copy_(before)
    assert len(found) == 1 + len(list(model.get_decoder().parameters()))
    assert model_fingerprint(model) in found


def test_a_byte_cap_reaches_the_cache():
    cache = new_cache(tiny(), pipelines()["quest"], max_bytes=1 << 20)
    assert cache.spec.max_bytes == 1 << 20
