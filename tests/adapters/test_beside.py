"""Forwards that others' code asks for inside a generate or another forward, beside plain models."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, LogitsProcessor

from kvpolicy import CachePipeline, PhaseError, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)
GREEDY = {"max_new_tokens": 6, "do_sample": False}
IDS = prompt([12])["input_ids"]
OTHER = prompt([5], seed=7)["input_ids"]
MODES = {
    "greedy": {}, "beams": {"num_beams": 2}, "lookup": {"prompt_lookup_num_tokens": 2},
    "chunks": {"prefill_chunk_size": 5}, "guidance": {"guidance_scale": 2.0},
    "dict": {"return_dict_in_generate": True},
}  # fmt: skip
ASKS = {
    "prompt": lambda model: model(IDS), "decoder": lambda model: model.model(OTHER),
    "no cache": lambda model: model(OTHER, use_cache=False),
}  # fmt: skip


class Streams:
    """Asks when it gets the prompt, as one that wants its perplexity does."""

    def __init__(self, model, ask):
        self.model, self.ask = model, ask

    def put(self, value):
        if value.ndim > 1:
            self.ask(self.model)

    def end(self):
        pass


class Asking(LlamaForCausalLM):
    ask = None


class Prepared(Asking):
    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        self.ask(self)
        kwargs["past_key_values"] = past_key_values
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        self.ask(self)
        return inputs


class Generates(Asking):
    def generate(self, *args, **kwargs):
        self.ask(self)
        return super().generate(*args, **kwargs)


class Stops(Asking):
    def _get_stopping_criteria(self, *args, **kwargs):
        self.ask(self)
        return super()._get_stopping_criteria(*args, **kwargs)


class Prefills(Asking):
    def _prefill(self, *args, **kwargs):
        self.ask(self)
        return super()._prefill(*args, **kwargs)


def made(kind):
    plain = tiny()
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def hooked(module, ask, pre=False):
    """Asks in each forward of `module`, but not in those that it asks for."""
    inside = []

    def hook(*args):
        if not inside:
            inside.append(True)
            try:
                ask()
            finally:
                inside.clear()

    return (module.register_forward_pre_hook if pre else module.register_forward_hook)(hook)


def ids_of(out):
    return getattr(out, "sequences", out)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["streamer", Prepared, Generates, Stops, Prefills, "hook"])
def test_who_asks_before_the_first_forward(kind, mode):
    """The generation's cache reads its own prompt alone."""
    options, streams = {**GREEDY, **MODES[mode]}, kind == "streamer"
    if streams and mode == "beams":
        pytest.skip("transformers streams no beams")
    model = made(kind) if isinstance(kind, type) else tiny()
    plain = ids_of(tiny().generate(IDS, **options))
    with attach(model, PIPELINE, **SIZES) as attached:
        for given, ask in itertools.product((False, True), ASKS.values()):
            model.ask = ask if isinstance(kind, type) else None
            more = {"streamer": Streams(model, ask)} if streams else {}
            if given:
                more["past_key_values"] = attached.new_cache()
            hook = kind == "hook" and hooked(model, lambda ask=ask: ask(model), pre=True)
            found = ids_of(model.generate(IDS, **options, **more))
            if hook:
                hook.remove()
            assert torch.equal(found, plain)
            if given and mode != "lookup":  # which ends with candidates in the cache
                assert more["past_key_values"].columns == found.shape[1] - 1


def test_policies_act_on_the_prompt_alone():
    """What a prompt's end evicts does not count what a streamer asked."""
    model, kept = tiny(), []
    with attach(model, pipelines()["snapkv"], **SIZES) as attached:
        for more in ({}, {"streamer": Streams(model, lambda model: model(OTHER))}):
            cache = attached.new_cache()
            model.generate(IDS.repeat(1, 3), past_key_values=cache, **GREEDY, **more)
            kept.append([cache.state.kept(1, 0, head).tolist() for head in (0, 1)])
            assert cache.report().evicted[0][0] > 0
    assert kept[0] == kept[1]


class Drops(LlamaForCausalLM):
    """Its own code reads the prompt, without the cache."""

    def _prefill(self, input_ids, config, model_kwargs, **kwargs):
        return self(input_ids, use_cache=True, return_dict=True)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_loop_whose_prompt_went_elsewhere(mode):
    model = made(Drops)
    with attach(model, PIPELINE, **SIZES) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match="^past_key_values: prepare_inputs_for_gen"):
            model.generate(IDS, past_key_values=cache, **GREEDY, **MODES[mode])
        assert cache.state is None and cache.phase == "prompt"


INSIDE = {
    "embeddings": lambda m: m.model.embed_tokens, "first": lambda m: m.model.layers[0],
    "last": lambda m: m.model.layers[-1], "mlp": lambda m: m.model.layers[-1].mlp,
    "norm": lambda m: m.model.norm,
}  # fmt: skip


@pytest.mark.parametrize("place", INSIDE)
@torch.no_grad()
def test_a_forward_inside_another_is_refused(place, llama):
    """Which is taken back; in the last layers nothing else would tell."""
    with attach(llama, PIPELINE, **SIZES) as attached:
        cache = attached.read(IDS[:, :7])
        before = digest(cache)
        nested = (lambda: llama(OTHER), lambda: llama.generate(OTHER, max_new_tokens=2))
        for ask in nested:
            hook = hooked(INSIDE[place](llama), ask)
            for call in (
                lambda: llama(IDS[:, 7:], past_key_values=cache),
                lambda: llama(IDS),
                lambda: llama.generate(IDS, past_key_values=cache, **GREEDY),
                lambda: llama.generate(IDS, num_beams=2, **GREEDY),
                lambda: llama.generate(IDS, prompt_lookup_num_tokens=2, **GREEDY),
            ):
                with pytest.raises(PhaseError, match="another"):
                    call()
                assert digest(cache) == before
            hook.remove()
        plain = attached.new_cache()
        llama(IDS[:, :7], past_key_values=plain)
        one, two = (llama(IDS[:, 7:], past_key_values=c).logits for c in (cache, plain))
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["greedy", "beams", "lookup"])
@pytest.mark.parametrize("place", ["decoder", "head"])
def test_a_forward_after_the_decoders(place, mode, llama):
    """A hook on the decoder or the head finds its forward closed."""
    plain = llama.generate(IDS, **GREEDY, **MODES[mode])
    with attach(llama, PIPELINE, **SIZES):
        hook = hooked(llama.model if place == "decoder" else llama.lm_head, lambda: llama(OTHER))
        assert torch.equal(llama.generate(IDS, **GREEDY, **MODES[mode]), plain)
        hook.remove()


class Looks(LogitsProcessor):
    """Looks ahead by a copy of generate's cache, with positions of its own."""

    def __init__(self, model, cache, shift):
        self.model, self.cache, self.shift = model, cache, shift
        self.calls, self.found, self.copy = 0, None, None

    def ahead(self):
        places = None if self.shift is None else torch.tensor([[self.length + self.shift]])
        return self.model(
            OTHER[:, :1] % 40 + 10, past_key_values=self.copy, position_ids=places
        ).logits

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            self.copy = copy.deepcopy(self.cache)
            self.length = self.copy.get_seq_length()
            self.found = self.ahead()
            self.copy = copy.deepcopy(self.cache)
        return scores


@pytest.mark.parametrize("shift", [None, 0, 9])
@pytest.mark.parametrize("mode", ["greedy", "guidance", "roberta"])
@torch.no_grad()
def test_positions_of_forks_that_are_made_inside_a_generate(mode, shift, llama):
    """Given ones count, during it and afterwards; others are a forward's of the model itself."""
    model = tiny_model(mode).eval() if mode == "roberta" else llama
    ids, options = IDS % 40 + 10, {**GREEDY, **MODES.get(mode, {})}

    def run(cache):
        looks = Looks(model, cache, shift)
        options["logits_processor"] = [looks]
        return model.generate(ids, past_key_values=cache, **options), looks.found, looks.ahead()

    plain = run(DynamicCache(config=model.config))
    with attach(model, PIPELINE, **SIZES) as attached:
        found = run(attached.new_cache())
    assert torch.equal(found[0], plain[0])
    for one, two in zip(found[1:], plain[1:], strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


class Tries(LogitsProcessor):
    """Tries a token at a position of its own on generate's cache, and takes it back."""

    def __init__(self, model, cache):
        self.model, self.cache, self.found = model, cache, []

    def __call__(self, input_ids, scores):
        places = torch.tensor([[self.cache.get_seq_length() + 9]])
        out = self.model(OTHER[:, :1], past_key_values=self.cache, position_ids=places)
        self.cache.crop(-1)
        self.found.append(out.logits)
        return scores


@torch.no_grad()
def test_positions_of_others_forwards_on_generates_cache(llama):
    def run(cache):
        tries = Tries(llama, cache)
        said = llama.generate(IDS, past_key_values=cache, logits_processor=[tries], **GREEDY)
        return said, torch.cat(tries.found)

    said, plain = run(DynamicCache(config=llama.config))
    with attach(llama, PIPELINE, **SIZES) as attached:
        ours, found = run(attached.new_cache())
    assert torch.equal(ours, said)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("inside", ["processor", "streamer"])
@torch.no_grad()
def test_column_positions_after_a_padded_forward_inside_a_generate(inside, llama):
    """Refused as outside, in a loop of one's own and on a cache that it leaves behind."""
    padded, made = prompt([9, 6]), []
    step = {
        "input_ids": padded["input_ids"][:, :1],
        "attention_mask": torch.cat([padded["attention_mask"], torch.ones(2, 1).long()], 1),
    }
    columns, counted = torch.tensor([[9], [9]]), torch.tensor([[9], [6]])
    with attach(llama, PIPELINE, **SIZES) as attached:

        def loop(*_):
            caches = [attached.new_cache() for _ in range(3)]
            for cache in caches:
                llama(**padded, past_key_values=cache)
            with pytest.raises(UnsupportedError, match="^position_ids: earlier forwards"):
                llama(**step, past_key_values=caches[0], position_ids=columns)
            own = llama(**step, past_key_values=caches[1].fork()).logits
            told = llama(**step, past_key_values=caches[1], position_ids=counted).logits
            torch.testing.assert_close(told, own)
            made.append(caches[2])

        streams = Streams(llama, loop)
        asks = {"processor": {"logits_processor": [lambda _, scores: loop() or scores]}}
        llama.generate(IDS, **asks.get(inside, {"streamer": streams}), max_new_tokens=2)
        assert made
        with pytest.raises(UnsupportedError, match="^position_ids: earlier forwards"):
            llama(**step, past_key_values=made[-1], position_ids=columns)


class Rescores(LogitsProcessor):
    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        return scores + self.model(input_ids=input_ids).logits[:, -1]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava", "gpt2"])
def test_a_processor_that_asks_a_model_which_makes_its_own_cache(name):
    model = tiny_model(name).eval()
    ids = torch.randint(20, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    options = {**GREEDY, "logits_processor": [Rescores(model)], "input_ids": ids}
    plain = model.generate(**options)
    with attach(model, PIPELINE, **SIZES):
        assert torch.equal(model.generate(**options), plain)
