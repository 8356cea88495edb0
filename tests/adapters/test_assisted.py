"""Assisted decoding with everything else a pipeline may do."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvpolicy import CachePipeline, SnapKV, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.dense import Dense, follow
from tests.support.adapters.faults import Break, Fault, Refusing, digest
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny
from tests.support.adapters.versions import NEWEST

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
MODES = {
    "lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda: {"assistant_model": tiny("llama")},  # its own drafts, mostly accepted
    "stranger": lambda: {"assistant_model": tiny("llama", seed=5)},  # mostly rejected
}
ALONE = ["striped", "gate", "quest", "snapkv"]


def inputs():
    """A prompt that repeats itself, so that lookup finds candidates in its first forward."""
    return {"input_ids": prompt([11])["input_ids"].repeat(1, 3)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind, name",
    [
        *[("llama", name) for name in (*ALONE, "gate-quest-snapkv")],
        *[pytest.param("qwen2-sliding", name, marks=pytest.mark.slow) for name in ALONE],
        ("qwen2-sliding", "gate-quest-snapkv"),
    ],
)
def test_equals_plain_decoding(kind, name, mode):
    model, pipeline = tiny(kind), pipelines()[name]
    with attach(model, pipeline, **SIZES) as attachment:
        plain, ours = attachment.new_cache(), attachment.new_cache()
        options = {**inputs(), "max_new_tokens": 24, **GREEDY}
        wanted = model.generate(**options, past_key_values=plain)
        out = model.generate(**options, past_key_values=ours, **MODES[mode]())
    assert torch.equal(out.sequences, wanted.sequences)
    for a, b in zip(out.logits, wanted.logits, strict=True):
        assert (a - b).abs().max() < 1e-3
    assert abs(ours.columns - plain.columns) <= 1
    for layer in range(2):
        for head in range(2):
            kept = [c.state.kept(layer, 0, head)[:-8].tolist() for c in (plain, ours)]
            shared = min(map(len, kept))
            assert kept[0][:shared] == kept[1][:shared]


def test_matches_the_oracle(llama):
    pipeline = pipelines()["gate-quest-snapkv"]
    with attach(llama, pipeline, **SIZES):
        out = llama.generate(**inputs(), max_new_tokens=16, prompt_lookup_num_tokens=3, **GREEDY)
    dense = Dense(llama, pipeline, **SIZES)
    wanted = follow(dense, inputs()["input_ids"][0], out.sequences[0, 33:])
    assert (torch.cat(out.logits) - wanted).abs().max() < 2e-3


@pytest.mark.parametrize("mode", MODES)
def test_evictions_while_decoding(llama, mode):
    """They wait until rejected candidates are gone, and keep their budget."""
    eviction = SnapKV(budget=14, observation=4, when="decode")
    with attach(llama, CachePipeline(eviction=eviction, window=5), **SIZES) as attachment:
        cache = attachment.new_cache()
        llama.generate(
            **inputs(), past_key_values=cache, max_new_tokens=40, **GREEDY, **MODES[mode]()
        )
        held = max(len(cache.state.kept(layer, 0, head)) for layer in (0, 1) for head in (0, 1))
    assert held <= 14 + 2 * SIZES["interval"] + 20
    assert cache.columns > 33 + 30
    assert sum(map(sum, cache.report().evicted)) > 4 * 25


@pytest.mark.parametrize("hidden", [True, False])
def test_hidden_states_of_a_crossing(llama, hidden):
    options = {**inputs(), "max_new_tokens": 8, "prompt_lookup_num_tokens": 3, **GREEDY}
    plain = llama.generate(**options, output_hidden_states=hidden)
    with attach(llama, CachePipeline(window=5)):
        out = llama.generate(**options, output_hidden_states=hidden)
    assert torch.equal(plain.sequences, out.sequences)
    if hidden:
        for a, b in zip(plain.hidden_states, out.hidden_states, strict=True):
            assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", ["gate", "snapkv"])
@pytest.mark.parametrize("nth", [1, 2])
def test_a_failing_crossing(llama, nth, name, begun):
    """A fault before or after the end of the prompt leaves the cache as it was."""
    ids = inputs()["input_ids"]
    with attach(llama, pipelines()[name], **SIZES) as attachment:
        runs = []
        for broken in (False, True):
            cache = attachment.new_cache()
            if begun:
                llama(ids[:, :10], past_key_values=cache)
            cache.begin_prompt(33)
            part = torch.cat([ids[:, cache.columns :], ids[:, :4]], 1)
            before = digest(cache)
            if broken:
                Break(llama, nth)
                with pytest.raises(Fault):
                    llama(part, past_key_values=cache)
                assert digest(cache) == before
                assert attachment.forwards.owner is None and attachment.forwards.crossing is None
            logits = llama(part, past_key_values=cache).logits
            assert logits.shape[1] == part.shape[1]
            runs.append((logits, digest(cache)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_a_failing_eviction_at_a_crossing(llama):
    ids = inputs()["input_ids"]
    with attach(llama, CachePipeline(eviction=Refusing(length=33), window=5)) as attachment:
        cache = attachment.new_cache()
        llama(ids[:, :10], past_key_values=cache)
        cache.begin_prompt(33)
        before = digest(cache)
        with pytest.raises(Fault):
            llama(torch.cat([ids[:, 10:], ids[:, :4]], 1), past_key_values=cache)
        assert digest(cache) == before
        assert attachment.forwards.owner is None


def test_padding_before_a_crossing(llama):
    pipeline = pipelines()["gate-quest-snapkv"]
    ids = inputs()["input_ids"]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(37) >= 4).long()[None]
    options = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    with attach(llama, pipeline, **SIZES):
        wanted = llama.generate(ids, **options)
        out = llama.generate(padded, attention_mask=mask, **options)
    assert torch.equal(out[:, 4:], wanted)


OPTIONS = [
    {"num_assistant_tokens": 2},
    {"num_assistant_tokens_schedule": "constant", "num_assistant_tokens": 3},
    {"assistant_confidence_threshold": 0.9},
    {"assistant_ensemble_weight": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_assistant_options(llama, options):
    """They belong to the assistant's own config, except those that mix both models."""
    assistant = tiny(seed=5)
    for name, value in options.items():
        setattr(assistant.generation_config, name, value)
    ids = prompt([9])["input_ids"].repeat(1, 3)
    given = {"max_new_tokens": 16, "do_sample": False, "assistant_model": assistant}
    if "assistant_ensemble_weight" in options:
        given |= {**options, "do_sample": True}
    torch.manual_seed(1)
    plain = llama.generate(ids, **given)
    torch.manual_seed(1)
    with attach(llama, CachePipeline(window=5)):
        assert torch.equal(plain, llama.generate(ids, **given))


@pytest.mark.parametrize("size", [1, 3])
def test_lookup_options(llama, size):
    ids = prompt([9])["input_ids"].repeat(1, 3)
    given = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": size, "max_new_tokens": 16}
    plain = llama.generate(ids, do_sample=False, **given)
    with attach(llama, CachePipeline(window=5)):
        assert torch.equal(plain, llama.generate(ids, do_sample=False, **given))


@NEWEST
def test_new_ids_after_padding(llama):
    """The mask is of all columns; transformers' loop would cut it to as many as there are ids."""
    ids = torch.cat([torch.zeros(1, 4, dtype=torch.long), inputs()["input_ids"]], 1)
    mask = (torch.arange(37) >= 4).long()[None]
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = llama.generate(ids, attention_mask=mask, **options)[:, 20:]
    options |= {"prompt_lookup_num_tokens": 3}
    with attach(llama, CachePipeline(window=5), **SIZES) as attachment:
        cache = attachment.read(ids[:, :20], mask[:, :20])
        given = {"attention_mask": mask, "past_key_values": cache.fork()}
        assert torch.equal(llama.generate(ids[:, 20:], **given, **options), plain)
        for question in ("prompt", "decode"):
            said = attachment.ask(cache, ids[:, 20:], question=question, **options)
            assert torch.equal(said, plain)
        mask[:, 22] = 0
        given = {"attention_mask": mask, "past_key_values": cache}
        with pytest.raises(UnsupportedError, match="^attention_mask: it hides columns, and assist"):
            llama.generate(ids[:, 20:], **given, **options)


def test_ids_that_the_cache_has_seen(llama):
    """transformers' loop reads them again, on its own cache too; the new ones alone are served."""
    ids = inputs()["input_ids"]
    options = {"max_new_tokens": 6, **GREEDY, "return_dict_in_generate": False}
    plain = llama.generate(ids, **options)
    rest = {"attention_mask": torch.ones_like(ids), "prompt_lookup_num_tokens": 3, **options}
    own = DynamicCache(config=llama.config)
    llama(ids[:, :20], past_key_values=own)
    theirs = llama.generate(ids[:, 20:], past_key_values=own, **rest)
    with attach(llama, CachePipeline(window=5), **SIZES) as attachment:
        cache = attachment.read(ids[:, :20])
        with pytest.raises(UnsupportedError, match="^past_key_values: assisted decoding reads all"):
            llama.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **options)
        if not torch.equal(theirs[:, -6:], plain[:, -6:]):  # older loops cut the mask short
            with pytest.raises(ValueError, match="^attention_mask: wanted .* at least .1, 34."):
                llama.generate(ids[:, 20:], past_key_values=cache, **rest)
            return
        out = llama.generate(ids[:, 20:], past_key_values=cache, **rest)
    assert torch.equal(out[:, -6:], plain[:, -6:])


def test_router_logits_beside_padding():
    """Their loss wants a mask of the whole forward, which is run as two."""
    model = tiny_model("mixtral")
    ids, mask = torch.arange(20, 32)[None], torch.tensor([[0, 0] + [1] * 10])
    options = {
        "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "prompt_lookup_num_tokens": 3,
    }  # fmt: skip
    for more in ({"output_router_logits": True}, {"attention_mask": mask}):
        plain = model.generate(ids, **more, **options)
        with attach(model, CachePipeline()):
            assert torch.equal(model.generate(ids, **more, **options), plain)
    routed = {"output_router_logits": True, "attention_mask": mask}
    with attach(model, CachePipeline()) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match=r"^output_router_logits: not in assisted"):
            model.generate(ids, past_key_values=cache, **routed, **options)
        assert cache.state is None
        model.config.output_router_logits = True
        with pytest.raises(UnsupportedError, match=r"^output_router_logits: not in assisted"):
            model.generate(ids, attention_mask=mask, **options)
