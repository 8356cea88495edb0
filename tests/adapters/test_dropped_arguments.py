"""Arguments and settings that were once dropped, or failed far from their cause."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.models import prompt, tiny

PIPELINE = CachePipeline(window=5)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@torch.no_grad()
def test_gaps_where_a_model_makes_masks_around_its_decoder():
    """transformers' masks keep the texts apart there, whether a cache is filled or not."""
    model = tiny_model("gemma3").eval()
    ids = torch.randint(20, 60, (1, 12), generator=torch.Generator().manual_seed(1))
    places = torch.cat([torch.arange(5), torch.arange(7) + 20])[None]
    plain = model(ids, position_ids=places).logits
    assert not torch.allclose(plain, model(ids).logits, atol=1e-2)
    with attach(model, PIPELINE):
        with pytest.raises(UnsupportedError, match="^position_ids: 2 texts in 1 rows"):
            model(ids, position_ids=places)
        apart = model(ids, position_ids=places, use_cache=False).logits
        whole = model(ids, position_ids=torch.arange(12)[None]).logits
    assert torch.allclose(apart, plain, atol=1e-4)
    assert torch.allclose(whole, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("qwen2-sliding", "sliding_window", 3),
        ("qwen2-sliding", "layer_types", ["full_attention"] * 2),
        ("llama", "sliding_window", 3),
        ("llama", "num_hidden_layers", 1),
    ],
)
def test_a_config_that_changes_while_attached(kind, name, value):
    model, ids = tiny(kind), prompt([12])
    plain = model(**ids).logits
    with attach(model, PIPELINE):
        before = getattr(model.config, name, None)
        setattr(model.config, name, value)
        for call in (model, lambda **ids: model.generate(**ids, **GREEDY)):
            with pytest.raises(UnsupportedError, match=f"^config.{name}: it has changed"):
                call(**ids)
        setattr(model.config, name, before)
        real = ids["attention_mask"].bool()
        assert (model(**ids).logits - plain)[real].abs().max() < 1e-4


class Own(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)


def test_a_generate_that_hands_on_what_it_is_given(llama):
    model = Own(llama.config).eval()
    ids = prompt([12])["input_ids"]
    plain = model.generate(ids, **GREEDY)
    with attach(model, PIPELINE):
        assert torch.equal(model.generate(ids, **GREEDY), plain)


@pytest.mark.parametrize("kind", [torch.tensor, lambda x: torch.tensor(x).numpy(), list])
def test_several_ends_in_a_tensor(llama, kind):
    ids = prompt([12])["input_ids"]
    free = llama.generate(ids, **GREEDY)[0, 12:].tolist()
    ends = kind([free[2], 199])
    plain = llama.generate(ids, **GREEDY, eos_token_id=ends)
    assert plain.shape[1] < 18
    with attach(llama, PIPELINE):
        assert torch.equal(llama.generate(ids, **GREEDY, eos_token_id=ends), plain)


def test_token_types_beside_prompt_lookup():
    model, ids = tiny_model("gpt2").eval(), prompt([12])["input_ids"] % 60
    given = {**GREEDY, "prompt_lookup_num_tokens": 4, "pad_token_id": 0}
    plain = model.generate(ids, token_type_ids=ids % 3, **given)
    assert not torch.equal(plain, model.generate(ids, **given))
    with attach(model, PIPELINE):
        assert torch.equal(model.generate(ids, token_type_ids=ids % 3, **given), plain)


@pytest.mark.parametrize("value", [False, 0, None])
def test_no_cache_in_any_spelling(llama, value):
    with attach(llama, PIPELINE), pytest.raises(UnsupportedError, match=f"^use_cache={value}: "):
        llama.generate(**prompt([12]), use_cache=value, **GREEDY)


def test_guidance_beside_prompt_lookup_is_refused(llama):
    with (
        attach(llama, PIPELINE),
        pytest.raises(UnsupportedError, match="^guidance_scale: not with"),
    ):
        llama.generate(**prompt([12]), guidance_scale=1.5, prompt_lookup_num_tokens=3, **GREEDY)


@pytest.mark.parametrize("where", ["call", "generation_config", "model"])
@pytest.mark.parametrize("more", [{}, {"top_k": 4}])
def test_contrastive_search_is_refused_by_the_name_that_asks(where, more, monkeypatch):
    """Where `top_k` is not given, transformers' default of 50 asks for it too."""
    model, ids, asked = tiny(), prompt([12])["input_ids"], {"penalty_alpha": 0.6, **more}
    options = {"call": asked, "generation_config": {where: GenerationConfig(**asked)}}
    if where == "model":
        for name, value in asked.items():
            monkeypatch.setattr(model.generation_config, name, value)
    with attach(model, PIPELINE) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match="^penalty_alpha: not served"):
            model.generate(ids, max_new_tokens=3, past_key_values=cache, **options.get(where, {}))
        assert cache.state is None
    off = {"penalty_alpha": 0.6, "top_k": 1, "max_new_tokens": 3}  # which is greedy search
    monkeypatch.undo()
    plain = model.generate(ids, **off)
    with attach(model, PIPELINE):
        assert torch.equal(model.generate(ids, **off), plain)
