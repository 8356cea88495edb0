"""What one request may ask for, and what becomes of the others."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from transformers import GenerationConfig

from kvpolicy import CachePipeline, KVzip
from kvpolicy.adapters.hf import Request, attach, generate_many
from kvpolicy.adapters.hf.many.room import Room
from kvpolicy.adapters.hf.many.steps import Steps
from kvpolicy.errors import PhaseError, UnsupportedError
from tests.support.adapters.many import alone, prompts
from tests.support.adapters.models import SIZES, pipelines, tiny
from tests.support.adapters.tokenizers import letters


@pytest.fixture
def attached(llama):
    with attach(llama, pipelines()["gate"], **SIZES) as found:
        yield found


def finish(attached, requests, **options):
    return {x.id: x for x in attached.generate_many(requests, **options)}


def test_what_ends_a_request(attached, llama):
    tokenizer = letters()
    text = "thequickbrownfoxjumps"
    ids = tokenizer(text)["input_ids"]
    whole = alone(llama, ids, 12)
    stops = [tokenizer.decode(whole[4:6]), "never"]
    found = finish(
        attached,
        [
            Request(ids, id="eos", max_new_tokens=12, eos_token_id=[whole[3], 1]),
            Request(text, id="stop", max_new_tokens=12, stop_strings=stops),
            Request(ids, id="length", generation_config=GenerationConfig(max_new_tokens=2)),
            Request(ids, id="max_length", max_length=len(ids) + 3),
        ],
        slots=4,
        tokenizer=tokenizer,
    )
    assert {n: (x.reason, x.tokens) for n, x in found.items()} == {
        "eos": ("eos", whole[: whole.index(whole[3]) + 1]),
        "stop": (
            "stop_string",
            alone(llama, ids, 12, stop_strings=stops, tokenizer=tokenizer),
        ),
        "length": ("length", whole[:2]),
        "max_length": ("length", whole[:3]),
    }
    assert all(x.text == tokenizer.decode(x.tokens) for x in found.values())
    times = found["eos"].timings
    assert 0 <= times.started <= times.first_token <= times.finished


def test_a_host_that_hears_of_tokens_late(attached, llama, monkeypatch):
    """As on a GPU: what was launched meanwhile for a request that has ended is dropped."""
    init = Steps.__init__

    def late(self, *args):
        init(self, *args)
        self.late = 1

    monkeypatch.setattr(Steps, "__init__", late)
    tokenizer, ids = letters(), prompts([(20, 0), (31, 0)])
    wholes = [alone(llama, x, 9) for x in ids]
    stop = tokenizer.decode(wholes[1][3])
    heard = []
    requests = [
        Request(ids[0], id="eos", max_new_tokens=9, eos_token_id=wholes[0][2]),
        Request(ids[1], id="stop", max_new_tokens=9, stop_strings=stop, on_token=heard.append),
        Request(ids[0], id="length", max_new_tokens=9),
        Request(ids[1], id="one", max_new_tokens=1),
    ]
    found = finish(attached, requests, slots=2, tokenizer=tokenizer)
    stopped = alone(llama, ids[1], 9, stop_strings=stop, tokenizer=tokenizer)
    assert found["eos"].tokens == wholes[0][: wholes[0].index(wholes[0][2]) + 1]
    assert found["eos"].held.tokens == 20 + len(found["eos"].tokens) - 1
    assert found["stop"].tokens == heard == stopped != wholes[1]
    assert found["length"].tokens == wholes[0] and found["one"].tokens == wholes[1][:1]


def test_draws_do_not_depend_on_others(attached):
    ids = prompts([(20, 0), (31, 0), (8, 0)])
    options = {"do_sample": True, "temperature": 1.5, "top_k": 30, "max_new_tokens": 8}
    more = {"top_p": 0.9, "repetition_penalty": 1.3, "min_p": 0.01}
    requests = [
        Request(ids[0], id=0, seed=3, **options),
        Request(ids[1], id=1, seed=3, **options, **more),
        Request(ids[0], id=2, seed=4, **options),
        Request(ids[2], id=3, max_new_tokens=5),
    ]
    together = finish(attached, requests, slots=3, tokens_per_call=16)
    for request in requests:
        single = finish(attached, [request])[request.id]
        assert single.tokens == together[request.id].tokens
    assert together[0].tokens != together[2].tokens


def test_processors_are_transformers_own(attached, llama):
    ids = prompts([(20, 0)])[0]
    options = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9]]}
    found = finish(attached, [Request(ids, max_new_tokens=10, **options)])[None]
    assert found.tokens == alone(llama, ids, 10, **options) != alone(llama, ids, 10)


def test_a_callback_that_raises_ends_its_request(attached, llama):
    ids = prompts([(20, 0)])[0]
    heard = []

    def fail(token):
        if len(heard) == 2:
            raise OSError("closed")
        heard.append(token)

    said = []
    requests = [
        Request(ids, id=0, max_new_tokens=6, on_token=fail),
        Request(ids, id=1, max_new_tokens=6, on_token=said.append),
    ]
    found = finish(attached, requests)
    whole = alone(llama, ids, 6)
    assert found[0].reason == "error" and isinstance(found[0].error, OSError)
    assert heard == whole[:2] and found[1].tokens == said == whole


def test_cancelled(attached, llama):
    ids = prompts([(20, 0)])[0]
    whole = alone(llama, ids, 6)
    waiting = Request(ids, id="waiting", max_new_tokens=6)
    running = Request(ids, id="running", max_new_tokens=6, on_token=lambda token: stop(token))

    def stop(token):
        if token == whole[1]:
            running.cancel()
            waiting.cancel()

    found = finish(attached, [running, waiting, Request(ids, id=2, max_new_tokens=6)], slots=1)
    assert [found[n].reason for n in ("running", "waiting", 2)] == ["cancelled"] * 2 + ["length"]
    assert found["running"].tokens == whole[: whole.index(whole[1]) + 1]
    assert found["waiting"].tokens == [] and found[2].tokens == whole


def test_requests_are_taken_when_there_is_room(attached, llama):
    """A rollout adds requests when others finish; None says that there is none for now."""
    ids = prompts([(20, 0), (9, 0)])
    taken, done = [], []

    def source():
        for n in range(4):
            while len(taken) - len(done) > 1:
                yield None
            taken.append(n)
            yield Request(ids[n % 2], id=n, max_new_tokens=3 + n)

    for finished in attached.generate_many(source(), slots=2):
        done.append(finished.id)
        assert finished.tokens == alone(llama, ids[finished.id % 2], 3 + finished.id)
        assert len(taken) <= len(done) + 1
    assert sorted(done) == [0, 1, 2, 3]


def test_what_requests_raise_comes_out_and_frees_everything(attached):
    def source():
        yield Request(prompts([(20, 0)])[0])
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        list(attached.generate_many(source()))


def test_closing_frees_everything(attached, llama, monkeypatch):
    made, init = [], Room.__init__

    def noted(self, *args):
        init(self, *args)
        made.extend(map(weakref.ref, self.state.devices.pools))

    monkeypatch.setattr(Room, "__init__", noted)
    ids, config = prompts([(20, 0)])[0], dict(vars(llama.config))
    found = attached.generate_many([Request(ids, id=n, max_new_tokens=n + 1) for n in range(5)])
    next(found)
    assert made[0]() is not None
    whole = alone(llama, ids, 4)  # the model is free between two of them
    assert next(found).tokens == whole[:2]
    found.close()
    del found
    gc.collect()
    assert [pool() for pool in made] == [None] and vars(llama.config) == config


def test_detached_meanwhile(llama):
    attached = attach(llama, pipelines()["gate"], **SIZES)
    ids = prompts([(20, 0)])[0]
    found = attached.generate_many([Request(ids, max_new_tokens=9 * n + 1) for n in range(2)])
    next(found)
    attached.detach()
    with pytest.raises(PhaseError, match="generate_many: the pipeline was detached"):
        next(found)


BAD = [
    ({"num_beams": 2}, "num_beams: many requests are decoded greedily or sampled"),
    ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens: many requests are decoded"),
    ({"penalty_alpha": 0.6}, "penalty_alpha: not served"),
    ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences: not for one of many"),
    ({"output_scores": True}, "output_scores: not for one of many"),
    ({"guidance_scale": 2.0}, "guidance_scale"),
    ({"max_time": 1.0}, "max_time"),
    ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
    ({"attention_mask": torch.ones(1, 4)}, "attention_mask: no option of one of many requests"),
    ({"streamer": None}, "streamer: no option"),
    ({"stop_strings": "a"}, "tokenizer: stop_strings needs"),
    ({"cache_implementation": "static"}, "cache_implementation: not beside"),
    ({"max_length": 15}, "max_new_tokens: wanted one new token or more, got -5 after 20"),
]


@pytest.mark.parametrize(("options", "says"), BAD, ids=[next(iter(x)) for x, _ in BAD])
def test_options_that_are_refused(attached, llama, options, says):
    ids = prompts([(20, 0)])[0]
    bad, good = Request(ids, id=0, **options), Request(ids, id=1, max_new_tokens=2)
    with pytest.raises((UnsupportedError, ValueError), match=says):
        attached.generate_many([good, bad])  # before anything runs
    found = finish(attached, iter([bad, good]))
    assert found[0].reason == "error" and says in str(found[0].error) and found[0].held is None
    assert found[1].tokens == alone(llama, ids, 2)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "inputs: wanted one or more ids from 0 below 200, got none"),
        ([5, 200], "inputs: wanted one or more ids from 0 below 200, got 200"),
        ("text", "inputs: wanted token ids, or a text beside tokenizer=, got 'text'"),
        ([1.5], "inputs: wanted a text, or token ids"),
        (torch.ones(2, 3, dtype=torch.long), "inputs: wanted ids"),
    ],
)
def test_inputs_that_are_refused(attached, inputs, says):
    with pytest.raises((ValueError, TypeError), match=says):
        attached.generate_many([Request(inputs)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"slots": 0}, "slots: wanted"),
        ({"tokens_per_call": 0}, "tokens_per_call: wanted"),
        ({"max_bytes": -1}, "max_bytes: wanted"),
        ({"shared_prefix": "text"}, "shared_prefix: wanted token ids, or a text beside"),
        ({"shared_prefix": [400]}, "shared_prefix: wanted"),
    ],
)
def test_arguments_that_are_refused(attached, options, says):
    with pytest.raises(ValueError, match=says):
        attached.generate_many([], **options)


def test_what_is_no_request(attached, llama):
    hint = re.escape("got [1, 2]; write Request([1, 2])")
    with pytest.raises(TypeError, match=f"requests: wanted Request objects, {hint}"):
        attached.generate_many([[1, 2]])
    with pytest.raises(TypeError, match=r"requests: wanted an iterable.*; write \[request\]"):
        attached.generate_many(Request([1, 2]))
    with pytest.raises(TypeError, match=r"requests: wanted.*; write \[Request\('hello'\)\]"):
        attached.generate_many("hello")
    with pytest.raises(TypeError, match=r"tokenizer: .*; write AutoTokenizer.from_pretrained"):
        attached.generate_many([], tokenizer="gpt2")
    with pytest.raises(TypeError, match=r"inputs: .*; write tokenizer.apply_chat_template"):
        attached.generate_many([Request([{"role": "user", "content": "Hello"}])])
    with pytest.raises(TypeError, match="on_token: wanted a function"):
        Request([1], on_token=3)
    with pytest.raises(PhaseError, match="generate_many: no pipeline is attached"):
        generate_many(tiny("qwen3"), [])


def test_pipelines_and_models_that_are_refused(llama, monkeypatch):
    with (
        attach(llama, CachePipeline(eviction=KVzip(budget=9), window=5), **SIZES) as attached,
        pytest.raises(UnsupportedError, match="generate_many: KVzip wants a replay"),
    ):
        attached.generate_many([])
    with attach(llama, CachePipeline(window=5), **SIZES) as attached:
        own = type(llama).prepare_inputs_for_generation

        def prepare(self, *args, **kwargs):
            return own(self, *args, **kwargs)

        monkeypatch.setattr(type(llama), "prepare_inputs_for_generation", prepare)
        with pytest.raises(UnsupportedError, match="prepare_inputs_for_generation is LlamaForCau"):
            attached.generate_many([])


def test_rope_that_follows_the_longest_sequence():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny("llama", rope_parameters=scaled, max_position_embeddings=32)
    with attach(model, CachePipeline(window=5), **SIZES) as attached:
        ids = prompts([(20, 0)])[0]
        found = finish(attached, [Request(ids, id=n, max_new_tokens=n) for n in (12, 13)])
    assert found[12].reason == "length" and found[13].reason == "error"
    assert "the RoPE of LlamaForCausalLM (dynamic) changes after 32 tokens" in str(found[13].error)
