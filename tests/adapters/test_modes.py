"""Modes of torch around an attached model: inference mode, autocast, training, copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import accelerate
import attrs
import pytest
import torch

from kvpolicy import Admission, CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.modes import ordinary
from tests.support.adapters.faults import digest, snapshot
from tests.support.adapters.models import SIZES, error, pipelines, prompt, tiny

PIPELINE = CachePipeline(window=5)
DICT = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
IDS = prompt([40])["input_ids"]


def test_an_error_that_is_handed_on_goes_when_it_is_caught():
    """A frame that holds it would be held by it, with the caches of all frames between."""

    @ordinary
    def hands_on(found):
        try:
            raise found
        finally:
            del found

    gc.disable()
    try:
        for grad in (True, False):
            found = type("Found", (ValueError,), {})("found")  # which may be referred to weakly
            there = weakref.ref(found)
            with pytest.raises(ValueError, match="found"), torch.set_grad_enabled(grad):
                hands_on(found)
            del found
            assert there() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["striped", "snapkv", "all", "gate-quest-snapkv"])
def test_a_cache_crosses_inference_mode(llama, name):
    """Each step inside it or outside, as if it were all outside."""

    def life(modes):
        def step(work):
            with torch.inference_mode() if next(modes) else torch.no_grad():
                return work()

        cache = attached.new_cache()
        step(lambda: llama(IDS[:, :30], past_key_values=cache))
        step(lambda: llama(IDS[:, 30:], past_key_values=cache))
        step(cache.end_prompt)
        for n in range(9):
            step(lambda n=n: llama(IDS[:, n : n + 1], past_key_values=cache))
        fork = step(cache.fork)
        step(lambda: llama(IDS[:, :1], past_key_values=fork))
        step(lambda: fork.crop(-1))
        step(lambda: llama(IDS[:, 1:2], past_key_values=fork))
        step(cache.begin_prompt)
        more = torch.cat([IDS, IDS[:, :12]], 1)
        step(lambda: llama.generate(more, past_key_values=cache, max_new_tokens=3, do_sample=False))
        found = digest(cache), digest(fork)
        step(cache.reset)
        step(lambda: llama(IDS, past_key_values=cache))
        return found

    with attach(llama, pipelines()[name], **SIZES) as attached:
        wanted = life(iter([False] * 99))
        for first in (False, True):
            modes = iter([first ^ bool(n % 2) for n in range(99)])
            assert life(modes) == wanted


@pytest.mark.parametrize("name", [None, "gate", "quest"])
def test_autocast(llama, name):
    """Keys come in bfloat16: a cache in the weights' dtype holds them exactly, or one as wanted."""
    pipeline = pipelines()[name] if name else PIPELINE
    exact = llama.generate(IDS, max_new_tokens=5, **DICT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = llama.generate(IDS, max_new_tokens=5, **DICT)
        for dtype in (None, torch.bfloat16):
            with attach(llama, pipeline, dtype=dtype) as attached:
                ours = llama.generate(IDS, max_new_tokens=5, **DICT)
                assert attached.spec.dtype == (dtype or torch.float32)
            if name is None:
                first = (ours.logits[0] - exact.logits[0]).abs().max()
                assert first <= 2 * (plain.logits[0] - exact.logits[0]).abs().max() + 1e-3


def test_policies_compute_in_the_dtype_of_the_cache(llama):
    """Autocast would round their products, and the attention's, to its own."""
    seen = set()

    @attrs.frozen(kw_only=True)
    class Seeing(Admission):
        window: int = 5

        def admit(self, write):
            seen.add((write.key @ write.key.mT).dtype)
            return torch.ones(write.key.shape[:2], dtype=torch.bool)

    pipeline = CachePipeline(admission=Seeing())
    with torch.autocast("cpu", dtype=torch.bfloat16), attach(llama, pipeline):
        llama.generate(IDS, max_new_tokens=3, **DICT)
    assert seen == {torch.float32}


@pytest.fixture
def accelerator_alone():
    """accelerate keeps the first Accelerator's settings for every later one of the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerator_alone")
def test_a_prepared_model():
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny())
    plain = model.generate(IDS, max_new_tokens=5, **DICT)
    with attach(model, PIPELINE):
        ours = model.generate(IDS, max_new_tokens=5, **DICT)
    assert (ours.logits[0] - plain.logits[0]).abs().max() < 0.1


def test_dtypes_that_lose(llama):
    """A cache never rounds unless it was told to."""
    with attach(llama, PIPELINE, dtype=torch.bfloat16) as attached:
        cache = attached.read(IDS)
        assert cache.state.spec.dtype == torch.bfloat16
    half = copy.deepcopy(llama).bfloat16()
    with attach(half, PIPELINE) as attached:
        cache = attached.new_cache()
        half.float()
        with pytest.raises(TypeError, match="wanted torch.bfloat16.*attach.*dtype=torch.float32"):
            half(IDS, past_key_values=cache)


@torch.enable_grad()
def test_train_mode_is_named():
    for extra, enable, match in (
        ({}, True, "^gradient_checkpointing"),
        ({"attention_dropout": 0.1}, False, "^attention_dropout"),
    ):
        model = tiny(**extra)
        if enable:
            for layer in model.model.layers:
                layer.gradient_checkpointing = True
        with attach(model, PIPELINE):
            model.train()
            before = snapshot(model)
            with pytest.raises(UnsupportedError, match=match):
                model.generate(IDS, max_new_tokens=2)
            assert snapshot(model) == before
            model.eval()
            model.generate(IDS, max_new_tokens=2)


def test_copies_are_refused(llama):
    with attach(llama, PIPELINE):
        before = snapshot(llama)
        for copying in (
            copy.deepcopy,
            pickle.dumps,
            lambda model: torch.save(model, io.BytesIO()),
        ):
            with pytest.raises(UnsupportedError, match="^copy: .*detach it first"):
                copying(llama)
        assert snapshot(llama) == before
        llama.state_dict()
    twin = copy.deepcopy(llama)
    with attach(twin, PIPELINE):
        assert (
            error(
                twin.generate(IDS, max_new_tokens=3, **DICT),
                llama.generate(IDS, max_new_tokens=3, **DICT),
            )
            < 1e-4
        )
