"""Memory that a common prefix or a reservation takes, and requests that ask for more than any."""

from __future__ import annotations

import itertools

import pytest

from kvpolicy import CapacityError
from kvpolicy.adapters.hf import Request, attach
from kvpolicy.adapters.hf.many.room import Room
from tests.support.adapters.many import alone, prompts
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

PAGE = 656  # bytes of one of "all"


def asked(prefix):
    return [
        Request([*prefix, *[5 + n] * (1 + n % 3)], id=n, max_new_tokens=6, eos_token_id=None)
        for n in range(4)
    ]


@pytest.mark.parametrize(
    ("length", "pages", "shared"),
    [
        (61, 68, True),  # a fork wants pages of its own where its heads end
        (113, 68, False),  # one that was parked has pages of its own beside the prefix
        (150, 76, False),  # a prompt does not fit beside the prefix
        (99, 110, True),  # reserved steps of nobody stand in a parked one's way
    ],
)
def test_a_prefix_is_given_up_before_a_request(llama, length, pages, shared, monkeypatch):
    prefix, dropped, drop = prompts([(length, 0)])[0], [], Room.drop_prefix
    monkeypatch.setattr(Room, "drop_prefix", lambda self: dropped.append(drop(self)))
    requests = asked(prefix)
    if shared:
        requests += [Request(x.inputs, id=x.id + 4, **x.options) for x in requests[:2]]
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        found = list(
            attached.generate_many(requests, slots=3, max_bytes=PAGE * pages, shared_prefix=prefix)
        )
        assert sorted(x.id for x in found) == [*range(len(requests))]
        for one in found:
            assert one.tokens == alone(llama, one.request.inputs, 6, eos_token_id=None)
    assert len(dropped) == (not shared)


def test_a_prefix_that_memory_cannot_hold_ends_no_other_request(llama):
    prefix, other = prompts([(150, 0), (20, 0)])
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        requests = [*asked(prefix), Request(other, id="other", max_new_tokens=6)]
        found = {
            x.id: x
            for x in attached.generate_many(requests, max_bytes=PAGE * 68, shared_prefix=prefix)
        }
        assert found.pop("other").tokens == alone(llama, other, 6)
    assert len(found) == 4 and all(isinstance(x.error, CapacityError) for x in found.values())


@pytest.mark.parametrize("kind", [list, iter])
def test_as_many_new_tokens_as_it_likes(llama, kind):
    """What nobody reads takes no memory: tables reach as far as the model's positions."""
    ids = prompts([(20, 0)])[0]
    options = {"max_new_tokens": 10**12, "repetition_penalty": 1.3}
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        whole = alone(llama, ids, 40, repetition_penalty=1.3, eos_token_id=None)
        end = whole[30]
        wanted = whole[: whole.index(end) + 1]
        requests = [Request(ids, eos_token_id=end, do_sample=False, **options) for _ in range(2)]
        found = list(attached.generate_many(kind(requests), slots=2))
        assert [(x.tokens, x.reason) for x in found] == [(wanted, "eos")] * 2


def test_a_question_with_as_many_new_tokens_as_it_likes(llama):
    ends = list(range(3, 120))
    request = Request([7, 8], max_new_tokens=10**12, do_sample=False, eos_token_id=ends)
    with attach(llama, pipelines()["gate"], **SIZES) as attached:
        (answer,) = attached.ask_many(attached.read(**prompt([23])), [request])
    assert answer.reason == "eos"


def test_longer_than_the_models_positions():
    model = tiny("llama", max_position_embeddings=32)
    ids = prompts([(20, 0), (40, 0)])
    with attach(model, pipelines()["all"], **SIZES) as attached:
        found = attached.generate_many(
            [Request(x, max_new_tokens=45, id=n) for n, x in enumerate(ids)]
        )
        for one in found:
            assert one.tokens == alone(model, ids[one.id], 45)


def test_requests_that_are_refused_come_out_at_once(attached_all):
    """An endless source of them is not read to its end."""
    taken = itertools.count()
    found = attached_all.generate_many((Request([], id=next(taken)) for _ in iter(int, 1)), slots=3)
    assert [next(found).id for _ in range(7)] == [*range(7)]
    assert next(taken) <= 9
    found.close()


@pytest.fixture
def attached_all(llama):
    with attach(llama, pipelines()["all"], **SIZES) as attached:
        yield attached
