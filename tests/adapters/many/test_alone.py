"""Each of many requests gets what generate gives it alone."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, CapacityError
from kvpolicy.adapters.hf import Request, attach, generate_many
from kvpolicy.adapters.hf.many.expected import Expected
from kvpolicy.adapters.hf.many.prompts import read
from kvpolicy.adapters.hf.many.room import Room
from tests.support.adapters.many import alone, many, prompts
from tests.support.adapters.models import SIZES, pipelines, tiny

LENGTHS = [(33, 9), (21, 12), (5, 20), (40, 6), (3, 1), (28, 15)]


@pytest.mark.parametrize(
    ("name", "slots", "tokens"), [("all", 3, 64), ("gate-quest-snapkv", 2, 9), ("striped", 6, 999)]
)
def test_prompts_in_parts_beside_decoding(llama, name, slots, tokens):
    given = list(zip(prompts(LENGTHS), [most for _, most in LENGTHS], strict=True))
    with attach(llama, pipelines()[name], **SIZES) as attached:
        found = many(attached, given, slots=slots, tokens_per_call=tokens)
        for n, (ids, most) in enumerate(given):
            assert found[n].tokens == alone(llama, ids, most)
            assert found[n].reason == "length" and found[n].prompt_tokens == len(ids)
            assert found[n].held.tokens == len(ids) + most - 1


def test_what_lanes_hold():
    """All layers count, and of pages shared with a fork the full ones alone."""
    model, window, lengths = tiny(layers=3), 5, (32, 14)
    with attach(model, CachePipeline(window=window), **SIZES) as attached:
        room = Room(attached, 2, SIZES)
        parts = [(lane, list(range(1, n + 1)), 0, True) for lane, n in enumerate(lengths)]
        read(model, room, parts)
        heads = 3 * model.config.num_key_value_heads
        for lane, n in enumerate(lengths):
            full, more = divmod(n - window, SIZES["page_size"])
            assert more and room.stored(lane) == heads * (n - window)
            assert room.held(room.lane_state)[lane] == (heads * (full + 1),)
            assert room.shared(room.lane_state)[lane] == (heads * full,)
        room.close()


def test_what_a_sequence_held(llama):
    ids = prompts([(40, 8)])[0]
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        held = many(attached, [(ids, 8)])[0].held
        alone(llama, ids, 8)
        report = attached.last_report()
    assert [list(map(float, heads)) for heads in held.stored] == report.stored
    assert held.bytes == report.pages + report.positions + report.summaries
    assert 0 < held.kept < 0.7


@pytest.mark.parametrize("name", ["gate", "snapkv"])
def test_parked_sequences_go_on(llama, name, monkeypatch):
    """Too little memory for what entered: the youngest waits outside and loses nothing."""
    monkeypatch.setattr(Expected, "need", lambda self, entry: tuple(0 for _ in self.pools))
    lengths = [(90, 25), (80, 20), (50, 25), (95, 6)]
    given = list(zip(prompts(lengths), [most for _, most in lengths], strict=True))
    with attach(llama, pipelines()[name], **SIZES) as attached:
        limit = 528 * 128  # bytes of a page, and pages
        found = many(attached, given, slots=4, tokens_per_call=200, max_bytes=limit)
        for n, (ids, most) in enumerate(given):
            assert found[n].tokens == alone(llama, ids, most)
    assert sum(x.parked for x in found.values()) >= 1 and found[0].parked == 0


def test_an_eviction_without_memory_waits(llama, monkeypatch):
    """It comes after a step whose tokens are in: none is fed twice."""
    maintain, failed = CachePipeline.maintain, []

    def short(self, state):
        if self.due(state) and len(failed) < 2:
            failed.append(state)
            raise CapacityError("none left")
        maintain(self, state)

    given = [(ids, 20) for ids in prompts([(60, 0), (25, 0)])]
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        wanted = [alone(llama, *one) for one in given]
        monkeypatch.setattr(CachePipeline, "maintain", short)
        found = many(attached, given, slots=2)
    assert [found[0].tokens, found[1].tokens] == wanted
    assert len(failed) == 2 and found[1].parked


def test_requests_enter_when_their_pages_are_free(llama):
    """What is known of earlier prompts keeps memory from running short."""
    lengths = [(60, 5)] * 6
    given = list(zip(prompts(lengths), [5] * 6, strict=True))
    with attach(llama, pipelines()["gate"], **SIZES) as attached:
        found = many(attached, given, slots=6, tokens_per_call=64, max_bytes=528 * 128)
    assert [x.reason for x in found.values()] == ["length"] * 6
    assert all(x.parked == 0 for x in found.values())


def test_a_request_that_memory_cannot_hold(llama):
    """Refused by name where its pages are known, ended where they show; others go on."""
    long, short = prompts([(400, 1), (30, 1)])
    for name in ("snapkv", "gate"):
        with attach(llama, pipelines()[name], **SIZES) as attached:
            given = [(short, 6), (long, 6), (short, 6)]
            found = many(attached, given, slots=2, tokens_per_call=64, max_bytes=528 * 128)
            assert found[0].tokens == found[2].tokens == alone(llama, short, 6)
        assert found[1].reason == "error" and "max_bytes" in str(found[1].error) or name == "gate"
        assert found[1].tokens == []


def test_a_cap_on_tokens_ends_the_request_that_exceeds_it(llama):
    """While reading and while decoding; the others go on."""
    long, grows, short = prompts([(60, 0), (25, 0), (9, 0)])
    given = [(long, 4), (grows, 20), (short, 6)]
    with attach(llama, CachePipeline(window=5), max_tokens=30, **SIZES) as attached:
        found = many(attached, given, slots=3, tokens_per_call=200)
        assert found[2].tokens == alone(llama, short, 6)
    for one, said in ((found[0], 0), (found[1], 6)):
        assert isinstance(one.error, CapacityError) and "max_tokens" in str(one.error)
        assert len(one.tokens) == said


def test_a_cap_that_evicts(llama):
    given = [(ids, 12) for ids in prompts([(60, 0), (25, 0)])]
    sizes = {"max_tokens": 30, "at_cap": "evict", **SIZES}
    with attach(llama, pipelines()["snapkv"], **sizes) as attached:
        found = many(attached, given, slots=2)
    assert all(x.reason == "length" for x in found.values())
    assert all(n <= 30 for x in found.values() for heads in x.held.stored for n in heads)


@pytest.mark.parametrize("kind", ["qwen2-sliding", "qwen3"])
def test_other_models(kind):
    model, read = tiny(kind), prompts(LENGTHS[:4])
    requests = [Request(torch.tensor(ids), id=n, max_new_tokens=5) for n, ids in enumerate(read)]
    with attach(model, pipelines()["all"], **SIZES):
        served = generate_many(model, requests, slots=2, tokens_per_call=16)
        found = {x.id: x.tokens for x in served}
        assert [found[n] for n in range(4)] == [alone(model, ids, 5) for ids in read]


def test_a_shared_prefix_is_read_once(llama):
    system = prompts([(24, 0)], seed=2)[0]
    tails = prompts([(9, 0), (14, 0), (3, 0)])
    given = [(system + tail, 7) for tail in tails] + [(tails[0], 7), (system, 7)]
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        read = []
        hook = llama.model.register_forward_hook(
            lambda module, args, kwargs, out: read.append(out.last_hidden_state.shape[1]),
            with_kwargs=True,
        )
        found = many(attached, given, slots=2, tokens_per_call=16, shared_prefix=system)
        hook.remove()
        prompts_read = sum(n for n in read if n > 1)
        for n, (ids, most) in enumerate(given):
            assert found[n].tokens == alone(llama, ids, most), n
    once = len(system) + sum(map(len, tails)) + len(tails[0]) + len(system)
    assert once - 5 <= prompts_read <= once
