"""Slots that decode by a captured step: one graph, whoever comes and goes."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.adapters.hf import attach, capture
from tests.support.adapters.many import alone, many, prompts
from tests.support.adapters.models import SIZES, pipelines, tiny

LENGTHS = [(33, 9), (21, 22), (5, 30), (40, 6), (28, 15)]


class Replayed:
    """In place of a graph: a replay does the device's part of a step and none of the host's."""

    def __init__(self, model, cache, tokens, positions):
        self.model, self.cache = model, cache
        self.generation, self.held = cache.state.generation, capture.HeldFast(model)

    def replay(self, tokens, positions):
        self.cache.capturing = True
        try:
            with self.cache.state.rehearsal():
                return capture.run(self.model, self.cache, tokens, positions)
        finally:
            self.cache.capturing = False


def counted(monkeypatch, kind):
    made = []

    def make(*args):
        made.append(args)
        return kind(*args)

    monkeypatch.setattr(capture, "CapturedStep", make)
    return made


@pytest.mark.parametrize("name", ["all", "gate-quest-snapkv"])
def test_replays_go_on_when_slots_change(llama, name, monkeypatch):
    given = list(zip(prompts(LENGTHS), [most for _, most in LENGTHS], strict=True))
    with attach(llama, pipelines()[name], **SIZES) as attached:
        wanted = [alone(llama, *one) for one in given]
        made = counted(monkeypatch, Replayed)
        monkeypatch.setattr(capture, "why_not", lambda *args: None)
        found = many(attached, given, slots=2, tokens_per_call=16)
        assert attached.decoding == "captured"
    assert [found[n].tokens for n in range(5)] == wanted
    assert [found[n].held.tokens for n in range(5)] == [n + most - 1 for n, most in LENGTHS]
    assert len(made) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu(compile, monkeypatch):
    """One capture for all, the same tokens; float32, whose products do not depend on the batch."""
    model = tiny(head_dim=64).cuda()
    given = list(zip(prompts(LENGTHS), [most for _, most in LENGTHS], strict=True))
    with attach(model, pipelines()["all"], compile=compile, **SIZES) as attached:
        wanted = [
            model.generate(
                torch.tensor([ids], device="cuda"), max_new_tokens=most, do_sample=False
            )[0, len(ids) :].tolist()
            for ids, most in given
        ]
        made = counted(monkeypatch, capture.CapturedStep)
        found = many(attached, given, slots=2, tokens_per_call=16)
        assert attached.decoding == "captured"
    assert [found[n].tokens for n in range(5)] == wanted
    assert len(made) == 1
