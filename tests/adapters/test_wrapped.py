"""Models inside wrappers such as PEFT's."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, PhaseError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import snapshot
from tests.support.adapters.models import prompt

PIPELINE = CachePipeline(window=5)


class Wrapper(torch.nn.Module):
    """What PEFT's models look like from outside."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_model(self):
        return self.base

    def generate(self, *args, **kwargs):
        return self.base.generate(*args, **kwargs)

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


def test_wrapped(qwen3):
    check_wrapped(Wrapper(qwen3))


def check_wrapped(model):
    inputs = prompt([12, 9])
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    before = snapshot_of_wrapped(model)
    with attach(model, PIPELINE) as attachment:
        assert torch.equal(plain, model.generate(**inputs, max_new_tokens=6, do_sample=False))
        assert attachment.decoding.startswith("eager")
        with pytest.raises(PhaseError, match="detach it first"):
            attach(model.get_base_model(), PIPELINE)
    assert snapshot_of_wrapped(model) == before


def snapshot_of_wrapped(model):
    return snapshot(model.get_base_model()), dict(model.__dict__)
