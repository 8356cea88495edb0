"""Random lives of many requests: parked, cancelled, failing, drawn and stopped, each as alone."""

from __future__ import annotations

import random

import pytest
import torch

from kvpolicy.adapters.hf import Request, attach
from kvpolicy.adapters.hf.many.engine import Engine
from kvpolicy.adapters.hf.many.expected import Expected
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.many import alone
from tests.support.adapters.models import SIZES, pipelines


def drawn(rng, number):
    """A request, and how it is asked alone."""
    ids = [rng.randrange(3, 200) for _ in range(rng.choice([2, 9, 30, 70]))]
    most = rng.choice([1, 3, 10, 30])
    options = {}
    if rng.random() < 0.3:
        options["repetition_penalty"] = 2.0
    if rng.random() < 0.3:
        options["eos_token_id"] = list(range(3, 23))
    if rng.random() < 0.2:
        options |= {"do_sample": True, "temperature": 1.2, "top_k": 20}
    return Request(ids, id=number, seed=number, max_new_tokens=most, **options)


def disturb(rng, requests):
    """Some raise, some are cancelled, after a number of tokens."""
    after = {}
    for request in requests:
        kind = rng.choice(["", "", "", "raise", "cancel"])
        if kind:
            count = rng.randrange(1, 6)
            after[request.id] = kind, count
            left = [count]

            def heard(token, request=request, kind=kind, left=left):
                left[0] -= 1
                if left[0] == 0:
                    if kind == "raise":
                        raise OSError("closed")
                    request.cancel()

            request.on_token = heard
    return after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed", "blind"),
    [("all", 0, False), ("gate", 1, True), ("gate-quest-snapkv", 2, True)],
)
def test_random_lives(llama, name, seed, blind, monkeypatch):
    rng = random.Random(seed)
    if blind:  # everybody enters, whatever there is: memory runs short again and again
        monkeypatch.setattr(Expected, "need", lambda self, entry: tuple(0 for _ in self.pools))
    with attach(llama, pipelines()[name], **SIZES) as attached:
        requests = [drawn(rng, n) for n in range(25)]
        wanted = {}
        for request in requests:
            ids, options = request.inputs, dict(request.options)
            if options.get("do_sample"):
                (single,) = attached.generate_many([request])
                wanted[request.id] = single.tokens
            else:
                wanted[request.id] = alone(llama, ids, options.pop("max_new_tokens"), **options)
        after = disturb(rng, requests)

        def source():
            for request in requests:
                while rng.random() < 0.3:
                    yield None
                yield request

        found = list(
            attached.generate_many(
                source(), slots=5, tokens_per_call=60 if blind else 7, max_bytes=656 * 80
            )
        )
    assert sorted(x.id for x in found) == [*range(25)]
    for one in found:
        whole = wanted[one.id]
        kind, count = after.get(one.id, ("", 99))
        if count < len(whole) or (count == len(whole) and kind == "raise"):
            assert one.tokens == whole[:count]
            assert one.reason == {"raise": "error", "cancel": "cancelled"}[kind]
        else:
            assert one.tokens == whole and one.reason in ("eos", "length")
    assert any(x.parked for x in found) or name != "gate"


def test_cancelled_while_its_prompt_is_read(llama):
    """Parts of it are there already; what it held is somebody else's then."""
    draw = random.Random(5)
    long, short = ([draw.randrange(3, 200) for _ in range(n)] for n in (300, 20))
    reading = Request(long, id="long", max_new_tokens=5)
    other = Request(short, id="short", max_new_tokens=12, on_token=lambda token: reading.cancel())
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        requests = [other, reading, Request(short, id="next", max_new_tokens=12)]
        found = attached.generate_many(requests, slots=2, tokens_per_call=32)
        found = {x.id: x for x in found}
        whole = alone(llama, short, 12)
    assert found["long"].reason == "cancelled" and found["long"].tokens == []
    assert 0 < found["long"].held.tokens < 300
    assert found["short"].tokens == found["next"].tokens == whole


@pytest.mark.parametrize(
    "kind", ["qwen3_5_text", pytest.param("falcon_h1", marks=pytest.mark.slow)]
)
def test_models_with_states_of_their_own(kind, monkeypatch):
    """Prompts are read one at a time; states go with their sequences, outside too."""
    model = tiny_model(kind).eval()
    rng = torch.Generator().manual_seed(3)
    given = [torch.randint(20, 60, (n,), generator=rng).tolist() for n in (24, 31, 9)]
    options = {"eos_token_id": None, "pad_token_id": 0}
    park = {3: 0}  # at the third step the second request waits outside for once
    step = Engine._step

    def parking(self, entries):
        park[3] += 1
        if park[3] == 3:
            self._park(entries[-1])
            entries = entries[:-1]
        step(self, entries)

    monkeypatch.setattr(Engine, "_step", parking)
    with attach(model, pipelines()["snapkv"], page_size=4) as attached:
        requests = [
            Request(ids, id=n, max_new_tokens=8, do_sample=False, **options)
            for n, ids in enumerate(given)
        ]
        found = {x.id: x for x in attached.generate_many(requests, slots=2, tokens_per_call=64)}
        assert sum(x.parked for x in found.values()) == 1
        for n, ids in enumerate(given):
            assert found[n].tokens == alone(model, ids, 8, **options)
