"""What attach changes, what detach restores, and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvpolicy import CachePipeline, PhaseError, UnsupportedError
from kvpolicy.adapters.hf import attach, detach, new_cache, spec_of
from tests.support.adapters.faults import snapshot
from tests.support.adapters.models import SIZES, gate, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)
HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def test_detach_restores_the_model(model):
    before = snapshot(model)
    attachment = attach(model, pipelines()["gate"])
    assert snapshot(model) != before
    model.generate(**prompt([9]), max_new_tokens=3)
    attachment.detach()
    assert snapshot(model) == before
    attachment.detach()
    attach(model, PIPELINE)
    detach(model)
    assert snapshot(model) == before
    with pytest.raises(PhaseError, match="no pipeline is attached"):
        detach(model)


def test_attach_sets_names_hooks_and_generate(model):
    before = snapshot(model)
    with attach(model, pipelines()["gate"]):
        model.generate(**prompt([9]), max_new_tokens=3)
        after = snapshot(model)
    parts = [*zip(before[0].values(), after[0].values(), strict=True)]
    found = [(was, now) for old, new in parts for was, now in zip(old, new, strict=True)]
    changed = {key for was, now in found for key in {*was, *now} if was.get(key) != now.get(key)}
    assert {key for key in changed if not key.endswith(HOOKS)} == {
        "generate", "_validate_generation_mode"
    }  # fmt: skip
    config = {key for key, value in after[1].items() if before[1].get(key, "absent") != value}
    assert {key.removesuffix("_internal") for key in config} == {"_attn_implementation"}
    assert after[2] == before[2]


def test_an_exception_inside_restores_the_model(llama):
    before = snapshot(llama)
    with pytest.raises(KeyError), attach(llama, pipelines()["gate"]):
        llama.model.layers[1].self_attn.v_proj.register_forward_hook(fail := Failing(KeyError()))
        llama.generate(**prompt([9]), max_new_tokens=3)
    llama.model.layers[1].self_attn.v_proj._forward_hooks.clear()
    assert fail.count == 1
    assert snapshot(llama) == before


class Failing:
    def __init__(self, error):
        self.error, self.count = error, 0

    def __call__(self, *args):
        self.count += 1
        raise self.error


def test_a_failing_attach_changes_nothing(llama):
    before = snapshot(llama)
    with pytest.raises(ValueError, match="WriteGate|layers"):
        attach(llama, CachePipeline(admission=gate(layers=3)))
    with pytest.raises(TypeError, match="pipeline: wanted a CachePipeline"):
        attach(llama, gate())
    with pytest.raises(TypeError, match="wanted one of page_size, .*at_cap"):
        attach(llama, PIPELINE, pages=3)
    assert snapshot(llama) == before


def test_a_wrapped_generate_comes_back(llama):
    llama.generate = own = lambda *args, **kwargs: "own"
    with attach(llama, PIPELINE):
        assert llama.generate is not own
    assert llama.generate is own


def test_second_attach(llama):
    with attach(llama, PIPELINE), pytest.raises(PhaseError, match="detach it first"):
        attach(llama, PIPELINE)
    with attach(llama, PIPELINE):
        pass


def test_nothing_keeps_a_dropped_model():
    model = tiny()
    attach(model, PIPELINE)
    model.generate(**prompt([9]), max_new_tokens=3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_other_models_are_refused():
    config = transformers.BloomConfig(n_layer=1, n_head=2, hidden_size=32, vocab_size=50)
    model = transformers.BloomForCausalLM(config)
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="layer 0 in BloomAttention .modeling_bloom.py"):
        attach(model, PIPELINE)
    assert snapshot(model) == before


def test_a_cache_without_attach(llama):
    cache = new_cache(llama, PIPELINE)
    for run, options in ((llama.generate, {"max_new_tokens": 3}), (llama, {})):
        with pytest.raises(PhaseError, match=r"inside attach\(model, pipeline\)"):
            run(**prompt([9]), past_key_values=cache, **options)


def test_a_cache_is_copied_by_forks_only(llama):
    """Another object with the same pages would free them twice."""
    with attach(llama, PIPELINE) as attached:
        cache = attached.new_cache()
        assert not cache.is_initialized
        llama(**prompt([9]), past_key_values=cache)
        assert cache.is_initialized and copy.deepcopy(cache).columns == 9
        for broken in (copy.copy, pickle.dumps):
            with pytest.raises(UnsupportedError, match=r"^copy: .*cache\.fork.*cache\.save"):
                broken(cache)


def test_a_cache_has_no_tensor_of_all_keys(llama):
    with attach(llama, PIPELINE):
        for cache in (new_cache(llama, PIPELINE), llama(**prompt([9])).past_key_values):
            for name in ("keys", "values"):
                with pytest.raises(UnsupportedError, match=f"^{name}: heads .* in pages"):
                    getattr(cache.layers[1], name)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"past_key_values": DynamicCache()}, TypeError, "wanted a KVPolicyCache.*DynamicCache"),
        ({"use_cache": False}, UnsupportedError, "use_cache=False"),
        ({"custom_generate": lambda *a, **k: None}, UnsupportedError, "custom_generate"),
        ({"prompt_lookup_num_tokens": 2}, ValueError, "batch_size = 1"),
    ],
)
def test_refused_by_generate(llama, options, error, match):
    with attach(llama, PIPELINE):
        with pytest.raises(error, match=match):
            llama.generate(**prompt([9, 9]), max_new_tokens=3, **options)
        llama.generate(**prompt([9, 9]), max_new_tokens=3)


def test_refused_by_forward(llama):
    inputs = prompt([9, 9])
    square = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    with attach(llama, PIPELINE):
        for options, error, match in (
            ({**inputs, "past_key_values": DynamicCache()}, TypeError, "DynamicCache"),
            ({**inputs, "attention_mask": square}, UnsupportedError, "2D mask"),
            ({**inputs, "attention_mask": torch.ones(2, 4)}, ValueError, "at least"),
            ({"attention_mask": torch.ones(2, 9)}, ValueError, "input_ids"),
            ({"input_ids": inputs["input_ids"][None]}, ValueError, r"input_ids: wanted \[B, S\]"),
        ):
            with pytest.raises(error, match=match):
                llama(**options)
        wanted = llama(**inputs).logits
        assert torch.equal(llama(**inputs, use_cache=False).logits, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@torch.no_grad()
def test_ways_around_the_hooks(llama):
    """A forward whose hooks do not run, or run once for all inputs, is refused."""
    ids = prompt([9])["input_ids"]
    plain = llama(ids).logits
    with attach(llama, PIPELINE):
        with pytest.raises(UnsupportedError, match=r"without a pipeline cache.* not \.forward"):
            llama.model.forward(ids)
        with pytest.raises(UnsupportedError, match="^trace: "):
            torch.jit.trace(lambda x: llama(x).logits, ids)
        with pytest.raises(UnsupportedError, match="^trace: "):
            torch.export.export(llama, (ids,))
        assert torch.allclose(llama(ids).logits, plain, atol=1e-4)
    assert torch.equal(llama(ids).logits, plain)


def test_a_cache_of_something_else(llama):
    other = CachePipeline(window=6)
    with attach(llama, PIPELINE):
        with pytest.raises(ValueError, match="another pipeline"):
            llama.generate(**prompt([9]), past_key_values=new_cache(llama, other))
        with pytest.raises(ValueError, match="another model"):
            llama(**prompt([9]), past_key_values=new_cache(tiny(layers=3), PIPELINE))


def test_guidance_needs_phases(llama):
    options = {"guidance_scale": 1.5, "max_new_tokens": 3}
    with (
        attach(llama, pipelines()["quest"]),
        pytest.raises(UnsupportedError, match="guidance_scale"),
    ):
        llama.generate(**prompt([9]), **options)


@torch.enable_grad()
def test_gradients_are_refused(llama):
    with attach(llama, PIPELINE):
        llama.train()
        with pytest.raises(UnsupportedError, match="inference only"):
            llama(**prompt([9]))
        llama.eval()
        logits = llama(**prompt([9])).logits
        with pytest.raises(UnsupportedError, match="detach it to compute gradients"):
            logits.sum().backward()
    llama(**prompt([9])).logits.sum().backward()


def test_a_shared_config_is_noticed():
    """Attention names live in the config: a second model of that config object must not run."""
    model = tiny()
    other = type(model)(model.config).eval()
    plain = other(**prompt([9])).logits
    with attach(model, PIPELINE), pytest.raises(UnsupportedError, match="copy of that config"):
        other(**prompt([9]))
    assert torch.equal(other(**prompt([9])).logits, plain)


@pytest.mark.parametrize("first", [0, 1])
def test_two_attached_models_of_one_config(first):
    """The attention's name comes back with the last of them."""
    model = tiny()
    models = model, type(model)(model.config).eval()
    before = [snapshot(m) for m in models]
    plain = [m.generate(**prompt([9]), max_new_tokens=5, do_sample=False) for m in models]
    attached = [attach(m, PIPELINE) for m in models]
    for m, tokens in zip(models, plain, strict=True):
        assert torch.equal(m.generate(**prompt([9]), max_new_tokens=5, do_sample=False), tokens)
    attached[first].detach()
    left = 1 - first
    ours = models[left].generate(**prompt([9]), max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, plain[left])
    attached[left].detach()
    assert [snapshot(m) for m in models] == before


def test_two_models_at_once(llama, qwen3):
    plain = [m.generate(**prompt([9]), max_new_tokens=5) for m in (llama, qwen3)]
    with attach(llama, PIPELINE), attach(qwen3, pipelines()["gate"]):
        assert torch.equal(llama.generate(**prompt([9]), max_new_tokens=5), plain[0])
        qwen3.generate(**prompt([9]), max_new_tokens=5)
    assert torch.equal(qwen3.generate(**prompt([9]), max_new_tokens=5), plain[1])


def test_registered_names_stay_out_of_the_way(llama):
    with attach(llama, PIPELINE):
        name = llama.config._attn_implementation
        assert name in ALL_MASK_ATTENTION_FUNCTIONS
        assert not any(word in name for word in ("flash", "sdpa", "flex", "paged|", "/", ":"))


def test_spec(model):
    spec = spec_of(model, **SIZES)
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (2, 4, 2, 16)
    assert spec.softmax_scale == model.model.layers[0].self_attn.scaling
    wanted = {"mistral": (6, 6), "qwen2": (), "llama": (), "qwen3": ()}[model.config.model_type]
    if getattr(model.config, "use_sliding_window", False):
        wanted = (None, 6)
    assert spec.sliding == wanted
