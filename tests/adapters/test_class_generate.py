"""The class's own generate, forward and call, and models that wrap the library's generate."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationMixin, LlamaForCausalLM

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import digest, snapshot
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
IDS = prompt([12])["input_ids"]


class Short(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "max_new_tokens": 3})


class Named(LlamaForCausalLM):
    def generate(self, input_ids, attention_mask=None, **kwargs):
        return super().generate(input_ids, attention_mask=attention_mask, **kwargs)


class Cut(LlamaForCausalLM):
    def generate(self, input_ids, **kwargs):
        return super().generate(input_ids=input_ids, **kwargs)[:, input_ids.shape[1] :]


class Drawn(LlamaForCausalLM):
    def generate(self, input_ids, **kwargs):
        return super().generate(input_ids, **{**kwargs, "do_sample": True, "top_k": 1})


class Embedded(LlamaForCausalLM):
    def generate(self, input_ids, **kwargs):
        return super().generate(inputs_embeds=self.model.embed_tokens(input_ids), **kwargs)


class Longer(LlamaForCausalLM):
    def generate(self, input_ids, **kwargs):
        return super().generate(torch.cat([IDS[:, :3], input_ids], 1), **kwargs)


class Beams(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "num_beams": 2})


class Several(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "do_sample": True, "num_return_sequences": 2})


class Guessed(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "prompt_lookup_num_tokens": 2})


class Unguessed(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "prompt_lookup_num_tokens": None})


class Drafted(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "assistant_model": tiny(seed=5)})


class Contrasted(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "penalty_alpha": 0.6})


class DrawnBeams(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "do_sample": True})


class Attentive(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "output_attentions": True})


class Uncached(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **{**kwargs, "use_cache": False})


class Loop(LlamaForCausalLM):
    """As Janus for images: what it is given is checked, and then not transformers' loop runs."""

    def generate(self, input_ids, **kwargs):
        _, rest = self._prepare_generation_config(None, **kwargs)
        self._validate_model_kwargs(rest)
        return input_ids


class Twice(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        super().generate(*args, **kwargs)
        return super().generate(*args, **kwargs)


class Closed(LlamaForCausalLM):
    def generate(self, input_ids, max_new_tokens=3):
        return super().generate(input_ids, max_new_tokens=max_new_tokens)


def made(kind):
    plain = tiny()
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("kind", [Short, Named, Cut, Drawn, Embedded, Longer])
@pytest.mark.parametrize("given", [False, True])
def test_a_generate_that_wraps_the_librarys(kind, given):
    model = made(kind)
    plain = model.generate(IDS, **GREEDY)
    with attach(model, PIPELINE, **SIZES) as attached:
        more = {"past_key_values": attached.new_cache()} if given else {}
        assert torch.equal(model.generate(IDS, **more, **GREEDY), plain)
        assert torch.equal(model.generate(input_ids=IDS, **GREEDY), plain)
    with attach(model, pipelines()["snapkv"], **SIZES) as attached:
        cache = attached.new_cache()
        model.generate(IDS.repeat(1, 3), past_key_values=cache, **GREEDY)
        assert cache.phase == "decode" and cache.report().evicted[0][0] > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Beams, "num_beams"), (Several, "num_return_sequences"), (Attentive, "output_attentions"),
        (Uncached, "use_cache"), (Guessed, "prompt_lookup_num_tokens"), (Closed, "generate"),
        (Loop, "generate"), (Drafted, "assistant_model"), (Contrasted, "penalty_alpha"),
        (DrawnBeams, "do_sample"), (Unguessed, "prompt_lookup_num_tokens"),
    ],
)  # fmt: skip
def test_a_generate_that_asks_for_something_else(kind, name):
    """It is refused before the cache has read anything; said in the call, it is what it is."""
    model = made(kind)
    with attach(model, PIPELINE, **SIZES) as attached:
        before, cache = snapshot(model), attached.new_cache()
        options = {"max_new_tokens": 3} if kind is Closed else {**GREEDY, "past_key_values": cache}
        options |= {DrawnBeams: {"num_beams": 2}, Unguessed: {name: 2}}.get(kind, {})
        with pytest.raises(UnsupportedError, match=f"^{name}: "):
            model.generate(IDS, **options)
        assert cache.state is None and snapshot(model) == before
    said = {Beams: {"num_beams": 2}, Guessed: {"prompt_lookup_num_tokens": 2}}.get(kind)
    if said is not None:
        plain = model.generate(IDS, **GREEDY, **said)
        with attach(model, PIPELINE, **SIZES):
            assert torch.equal(model.generate(IDS, **GREEDY, **said), plain)


def test_a_generate_that_generates_twice():
    model = made(Twice)
    with attach(model, PIPELINE, **SIZES), pytest.raises(UnsupportedError, match="^generate: Twi"):
        model.generate(IDS, **GREEDY)


def test_a_generate_that_hands_other_columns_on():
    """Where ours has announced the prompt's end to transformers' loop."""
    model = made(Longer)
    with attach(model, PIPELINE, **SIZES) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match="^input_ids: Longer hands 15 on"):
            model.generate(IDS, num_beams=2, past_key_values=cache, **GREEDY)
        assert cache.state is None


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("holder", [GenerationMixin, LlamaForCausalLM])
def test_the_classs_generate_is_refused(llama, holder, given):
    plain = llama.generate(IDS, **GREEDY)
    with attach(llama, PIPELINE, **SIZES) as attached:
        cache = attached.read(IDS[:, :5])
        before, held = snapshot(llama), digest(cache)
        more = {"past_key_values": cache} if given else {}
        with pytest.raises(UnsupportedError, match="^generate: the class's or an inner"):
            holder.generate(llama, IDS, **more, **GREEDY)
        assert snapshot(llama) == before and digest(cache) == held
        assert torch.equal(llama.generate(IDS, **GREEDY), plain)
    assert torch.equal(holder.generate(llama, IDS, **GREEDY), plain)


def test_the_classs_forward_and_call(llama):
    plain = llama(IDS).logits
    with attach(llama, PIPELINE, **SIZES):
        for call in (type(llama).forward, type(llama).__call__, torch.nn.Module.__call__):
            torch.testing.assert_close(call(llama, IDS).logits, plain, atol=1e-4, rtol=0)
