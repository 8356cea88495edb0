"""Our decoding loop: sequences that end, what is recorded, and how a token is chosen."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach, capture, decode_loop
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)


def ending(model, inputs, after):
    """The token that ends the first row after `after` tokens and no other row by then."""
    plain = model.generate(**inputs, max_new_tokens=after + 1, do_sample=False)
    new = plain[:, inputs["input_ids"].shape[1] :]
    stop = int(new[0, after])
    assert stop not in new[1:] and stop not in new[0, :after]
    return stop


def test_recorded(llama):
    """As transformers' own loop records it; sequences that ended store no padding."""
    inputs = prompt([17, 11])
    options = {
        "max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True,
        "output_hidden_states": True, "eos_token_id": ending(llama, inputs, 3),
    }  # fmt: skip
    plain = llama.generate(**inputs, **options)
    with attach(llama, PIPELINE, **SIZES) as attachment:
        ours = llama.generate(**inputs, **options)
        assert attachment.decoding == "eager: hidden_states are wanted of every step"
    assert torch.equal(plain.sequences, ours.sequences)
    found, wanted = ours.hidden_states, plain.hidden_states
    assert [len(step) for step in found] == [len(step) for step in wanted]
    alive = slice(1, 2)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert all(torch.allclose(x[alive], y[alive], atol=1e-4) for x, y in zip(a, b, strict=True))
    assert ours.past_key_values.state.lengths == [17 + 4, 11 + 8]


def test_crop_over_rows_that_ended(llama, monkeypatch):
    """A captured step learns late which rows had ended; crop takes back what they stored."""
    monkeypatch.setattr(capture, "why_not", lambda *args: None)
    monkeypatch.setattr(capture, "WARM_UP", 100)  # the captured path, without a graph
    with attach(llama, pipelines()["striped"], **SIZES) as attachment:
        cache = attachment.new_cache()
        inputs = prompt([17, 11])
        llama(**inputs, past_key_values=cache)
        cache.end_prompt()
        stepper = capture.Stepper(llama, cache, torch.tensor([[17], [11]]), room=9)
        for step in range(8):
            stepper.step(torch.tensor([5, 6]), torch.tensor([step < 3, step < 7]))
        stepper.finish(extra=1)
        assert cache.state.lengths == [20, 18] and cache.columns == 24
        cache.crop(-5)
        assert cache.state.lengths == [19, 13] and cache.columns == 19
        cache.crop(-2)
        assert cache.state.lengths == [17, 11]


def test_sampling_is_multinomial(monkeypatch):
    """The same tokens from the same seed, without the host sync of torch.multinomial."""
    scores = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)) * 3
    scores[:, 50:] = -torch.inf
    torch.manual_seed(7)
    wanted = [torch.multinomial(scores.softmax(-1), 1).squeeze(1) for _ in range(20)]
    monkeypatch.delattr(torch, "multinomial")
    torch.manual_seed(7)
    found = [decode_loop._choose(scores, sample=True) for _ in range(20)]
    assert torch.equal(torch.stack(found), torch.stack(wanted))
    assert len({tuple(tokens.tolist()) for tokens in found}) > 10


def test_streamers_get_the_prompt_and_every_token():
    class Collect:
        def __init__(self):
            self.seen, self.ended = [], 0

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended += 1

    model, inputs, collect = tiny(), prompt([9]), Collect()
    with attach(model, PIPELINE):
        out = model.generate(**inputs, max_new_tokens=6, do_sample=True, top_k=10, streamer=collect)
    assert collect.seen == out[0].tolist() and collect.ended == 1


def test_what_stopping_criteria_see(llama):
    """Ids and scores so far, in the types of transformers' own loop."""

    def seen(**options):
        calls = []

        class Watch(StoppingCriteria):
            def __call__(self, ids, scores, **kwargs):
                calls.append(
                    (ids.clone(), scores and tuple(x.clone() for x in scores), type(scores))
                )
                return torch.zeros(ids.shape[0], dtype=torch.bool)

        llama.generate(
            **prompt([9, 6]),
            max_new_tokens=4,
            do_sample=False,
            stopping_criteria=[Watch()],
            **options,
        )
        return calls

    scored = {"return_dict_in_generate": True, "output_scores": True}
    wanted = [*seen(), *seen(**scored)]
    with attach(llama, PIPELINE, **SIZES):
        found = [*seen(), *seen(**scored)]
    for (ids, scores, kind), (plain, known, type_) in zip(found, wanted, strict=True):
        assert torch.equal(ids, plain) and kind is type_ and len(scores or ()) == len(known or ())
        for x, y in zip(scores or (), known or (), strict=True):
            assert torch.allclose(x, y, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_nothing_can_be_drawn_from(llama, value):
    """transformers raises in torch.multinomial; the model goes on afterwards."""

    class Spoil(LogitsProcessor):
        calls = 0

        def __call__(self, ids, scores):
            self.calls += 1
            if self.calls == 3:
                scores[1, 4 if value == torch.inf else slice(None)] = value
            return scores

    def run(**options):
        return llama.generate(**prompt([9, 6]), max_new_tokens=5, do_sample=True, **options)

    with pytest.raises(RuntimeError, match="probability tensor"):
        run(logits_processor=[Spoil()])
    torch.manual_seed(0)
    plain = run()
    with attach(llama, PIPELINE, **SIZES):
        with pytest.raises(ValueError, match="^do_sample: a row's scores are infinite"):
            run(logits_processor=[Spoil()])
        torch.manual_seed(0)
        assert torch.equal(run(), plain)


class Rewrites(StoppingCriteria):
    """Writes another token into the ids it is shown, at one length."""

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] == 19:
            input_ids[:, -1] = 7
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Said:
    """A streamer that keeps the tokens."""

    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


def test_what_a_criterion_writes_is_read_next(llama):
    inputs = prompt([17])
    options = {"max_new_tokens": 7, "do_sample": False}
    first = llama.generate(**inputs, **options)
    options["stopping_criteria"], told, ours = [Rewrites()], Said(), Said()
    plain = llama.generate(**inputs, **options, streamer=told)
    assert not torch.equal(plain[:, 19:], first[:, 19:])
    with attach(llama, PIPELINE, **SIZES):
        assert torch.equal(llama.generate(**inputs, **options, streamer=ours), plain)
    assert ours.tokens == told.tokens


class Overwrites(Said):
    """A streamer that writes into the tokens it was given, once it has read them."""

    def put(self, value):
        super().put(value)
        if value.numel() == 1:
            value.fill_(7)


def test_what_a_streamer_writes_is_not_read(llama):
    inputs, told, ours = prompt([17]), Overwrites(), Overwrites()
    options = {"max_new_tokens": 7, "do_sample": False}
    plain = llama.generate(**inputs, **options, streamer=told)
    with attach(llama, PIPELINE, **SIZES):
        assert torch.equal(llama.generate(**inputs, **options, streamer=ours), plain)
    assert ours.tokens == told.tokens


@pytest.mark.parametrize("layers", [1, -1, [0, -1], True])
def test_hidden_states_of_some_layers(llama, layers):
    inputs, told = prompt([17]), []
    options = {
        "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True,
        "output_hidden_states": layers,
    }  # fmt: skip
    plain = llama.generate(**inputs, **options).hidden_states
    with attach(llama, PIPELINE, **SIZES):
        found = llama.generate(**inputs, **options).hidden_states
    for step in (plain, found):
        told.append([[None if x is None else tuple(x.shape) for x in each] for each in step])
    assert told[0] == told[1]
    flat = zip(sum(map(list, plain), []), sum(map(list, found), []), strict=True)
    assert all(a is None or torch.allclose(a, b, atol=1e-4) for a, b in flat)


@pytest.mark.parametrize("layers", [0, [], False, None])
def test_hidden_states_of_no_layer(llama, layers):
    options = {
        "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True,
        "output_hidden_states": layers,
    }  # fmt: skip
    assert llama.generate(**prompt([17]), **options).hidden_states is None
    with attach(llama, PIPELINE, **SIZES):
        assert llama.generate(**prompt([17]), **options).hidden_states is None


class Views(LogitsProcessor):
    """Somebody's own, which reads memory in order."""

    def __call__(self, input_ids, scores):
        assert len(input_ids.view(-1)) == input_ids.numel()
        return scores


class Writes(StoppingCriteria):
    """Somebody's own, which writes another token into the ids it sees."""

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids.view(-1)) == input_ids.numel()
        input_ids[:, -1] = 7 + input_ids.shape[1] % 5
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("wanted", [False, True])
def test_ids_lie_in_memory_of_their_own(llama, wanted):
    options = {"max_new_tokens": 50, "do_sample": False, "return_dict_in_generate": wanted}
    options |= {"logits_processor": [Views()], "stopping_criteria": [Writes()]}
    inputs, ends = prompt([9, 9, 9]), {"max_new_tokens": 500, "eos_token_id": [*range(200)]}
    found = [llama.generate(**inputs, **options)]
    with attach(llama, PIPELINE, **SIZES):
        found.append(llama.generate(**inputs, **options))
        row = llama.generate(inputs["input_ids"][:1], **ends)
    plain, ours = (x.sequences if wanted else x for x in found)
    assert torch.equal(plain, ours) and len(set(ours[0, 9:].tolist())) == 5
    assert ours.view(-1).untyped_storage().nbytes() == ours.numel() * 8
    assert row.shape == (1, 10) and row.untyped_storage().nbytes() == 80
