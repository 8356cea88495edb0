"""One forward of an attached model: all or nothing, one thread, no waiting for the device."""

from __future__ import annotations

import threading

import attrs
import pytest
import torch

from kvpolicy import Admission, CachePipeline, PhaseError
from kvpolicy.adapters.hf import attach, new_cache
from kvpolicy.testing._spy import watch
from tests.support.adapters.faults import Break, Fault, Refusing, digest
from tests.support.adapters.models import SIZES, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)


def step(model, cache, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["striped", "snapkv", "all"])
@pytest.mark.parametrize("when", ["first", "chunk", "decode"])
def test_a_failing_layer(llama, name, when, error):
    pipeline, inputs = pipelines()[name], prompt([33, 21])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with attach(llama, pipeline, **SIZES) as attachment:
        caches = attachment.new_cache(), attachment.new_cache()
        for cache in caches:
            if when != "first":
                step(llama, cache, ids[:, :20], mask[:, :20])
            if when == "decode":
                step(llama, cache, ids[:, 20:], mask[:, 20:])
                cache.end_prompt()
        part = {"first": slice(0, 33), "chunk": slice(20, 33), "decode": slice(32, 33)}[when]
        before = digest(caches[0])
        Break(llama, error=error)
        with pytest.raises(error):
            step(llama, caches[0], ids[:, part], mask[:, part])
        if error is Fault:
            assert digest(caches[0]) == before
            assert attachment.forwards.owner is None
        again = step(llama, caches[0], ids[:, part], mask[:, part])
        assert torch.equal(again, step(llama, caches[1], ids[:, part], mask[:, part]))
        assert digest(caches[0]) == digest(caches[1])


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_failing_generate(llama, nth):
    inputs = prompt([33, 21])
    pipeline = pipelines()["all"]
    with attach(llama, pipeline, **SIZES) as attachment:
        wanted = llama.generate(**inputs, max_new_tokens=8, do_sample=False)
        Break(llama, nth)
        with pytest.raises(Fault):
            llama.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert attachment.forwards.owner is None and not attachment.forwards.held
        assert torch.equal(wanted, llama.generate(**inputs, max_new_tokens=8, do_sample=False))


def test_another_batch_after_a_failure(llama):
    with attach(llama, PIPELINE) as attachment:
        cache = attachment.new_cache()
        Break(llama)
        with pytest.raises(Fault):
            step(llama, cache, prompt([9, 9])["input_ids"])
        step(llama, cache, prompt([9])["input_ids"])


def test_an_error_in_open_releases_the_model(llama):
    cache = new_cache(llama, CachePipeline(window=6))
    with attach(llama, PIPELINE) as attachment:
        for bad in (cache, object()):
            with pytest.raises((TypeError, ValueError)):
                step(llama, bad, prompt([9])["input_ids"])
            assert attachment.forwards.owner is None
        done = []
        thread = threading.Thread(target=lambda: done.append(llama(prompt([9])["input_ids"])))
        thread.start()
        thread.join()
        assert done


@pytest.mark.parametrize("length", [20, 24])
def test_a_failing_eviction(llama, length):
    """At the end of the prompt, and while decoding: the tokens are in, and counted."""
    pipeline = CachePipeline(eviction=Refusing(length=length), window=5)
    with attach(llama, pipeline, **SIZES) as attachment:
        cache = attachment.new_cache()
        with pytest.raises(Fault):
            llama.generate(**prompt([20]), past_key_values=cache, max_new_tokens=12)
        assert cache.columns == cache.state.lengths[0] == length
        assert attachment.forwards.owner is None


def test_end_prompt_is_asked_for(llama):
    """A decode call with an eviction of the prompt still to come has no meaning."""
    with attach(llama, pipelines()["snapkv"]) as attachment:
        cache = attachment.new_cache()
        step(llama, cache, prompt([20])["input_ids"])
        cache.phase = "decode"
        with pytest.raises(PhaseError, match="end_prompt"):
            step(llama, cache, prompt([1])["input_ids"])
        cache.end_prompt()
        step(llama, cache, prompt([1])["input_ids"])


def test_the_caller_names_the_phase(llama):
    """A prompt of one token reads everything; the same token decoded reads what it selects."""
    ids = prompt([33])["input_ids"]
    with attach(llama, pipelines()["quest"], **SIZES) as attachment:
        wanted = step(llama, attachment.new_cache(), ids)[:, 32:]
        cache = attachment.new_cache()
        step(llama, cache, ids[:, :32])
        assert torch.allclose(step(llama, cache, ids[:, 32:]), wanted, atol=1e-4)
        cache.crop(-1)
        cache.end_prompt()
        assert not torch.allclose(step(llama, cache, ids[:, 32:]), wanted, atol=1e-2)


@pytest.mark.parametrize("same", [True, False], ids=["same cache", "own cache"])
@pytest.mark.parametrize("entry", ["forward", "generate"])
def test_second_thread(llama, entry, same):
    """The one that came first goes on undisturbed."""
    ids = prompt([20])["input_ids"]
    inside, leave, caught = threading.Event(), threading.Event(), []
    with attach(llama, PIPELINE, **SIZES) as attachment:
        wanted = step(llama, attachment.new_cache(), ids)
        cache = attachment.new_cache()

        def wait(*args):
            if threading.current_thread() is first:
                inside.set()
                assert leave.wait(30)

        def work():
            with torch.no_grad():
                found.append(step(llama, cache, ids))

        found, first = [], threading.Thread(target=work)
        handle = llama.model.layers[1].register_forward_pre_hook(wait)
        first.start()
        assert inside.wait(30)
        mine = cache if same else attachment.new_cache()
        with pytest.raises(PhaseError, match="another thread") as caught:
            if entry == "forward":
                step(llama, mine, ids)
            else:
                llama.generate(ids, past_key_values=mine, max_new_tokens=2)
        leave.set()
        first.join()
        handle.remove()
        assert caught and torch.equal(found[0], wanted)
        assert cache.state.lengths == [20]
        step(llama, attachment.new_cache(), ids)


def test_generate_holds_the_model(llama):
    """Between two forwards of a generate no other thread gets in."""
    caught = []

    class Meanwhile:
        def put(self, value):
            thread = threading.Thread(target=self.other)
            thread.start()
            thread.join()

        def other(self):
            try:
                llama(prompt([9])["input_ids"])
            except PhaseError as error:
                caught.append(error)

        def end(self):
            pass

    with attach(llama, PIPELINE):
        llama.generate(**prompt([9]), max_new_tokens=3, streamer=Meanwhile())
        assert len(caught) == 4
        llama(prompt([9])["input_ids"])


@attrs.frozen(kw_only=True)
class Always(Admission):
    """Not neutral, and without a host sync of its own."""

    window: int | None = 5

    def admit(self, write):
        return torch.ones_like(write.key[..., 0], dtype=torch.bool)


def test_decode_forward_waits_for_nothing(monkeypatch):
    """The adapter's part of a decode step: all but the backend's ops."""
    model = tiny("qwen3")
    pipeline = CachePipeline(admission=Always())
    with attach(model, pipeline, **SIZES) as attachment:
        cache = attachment.new_cache()
        step(model, cache, prompt([33])["input_ids"])
        cache.end_prompt()
        token = prompt([1])["input_ids"]
        step(model, cache, token)
        state = cache.state
        state.widen(100)
        cache.pipeline.reserve(state, 16)
        quiet = type("Quiet", (), {"backend": "reference"})()
        quiet.decode_write = lambda *args, **kwargs: None
        quiet.paged_decode = lambda query, *args, **kwargs: torch.zeros_like(query)[:, :]
        state.ops = quiet
        with watch() as seen:
            step(model, cache, token)
        with watch() as control:
            step(model, cache, token, torch.ones_like(token))
    assert seen.syncs == []
    assert control.syncs  # a mask on the device has to be read
