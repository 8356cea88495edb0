"""Attaching to a model that has been used: what its forwards left in its modules is set aside."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import nn

from kvpolicy.adapters.hf.rule.probe import probe
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from kvpolicy.adapters.hf.rule.untouched import untouched

IDS = torch.randint(20, 60, (2, 12), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# How far images move positions; states of recurrent layers.
KEPT = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "recurrent_gemma")


def left_in(model):
    """Tensors in a model's modules that are no weights and no buffers."""
    return {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_a_check_after_a_batch(name):
    """It finds what it found before, and puts back what it set aside."""
    model = tiny_model(name)
    fresh = probe(model, again=True)
    assert not left_in(model)
    model.generate(IDS, **GREEDY)
    for module in model.modules():
        if hasattr(module, "rope_deltas"):  # as images of two rows would have it
            module.rope_deltas = torch.tensor([[-3], [-5]])
    left = left_in(model)
    assert left and all(len(value) == 2 for value in left.values())
    found = probe(model, again=True)
    assert attrs.evolve(found, difference=fresh.difference) == fresh
    after = left_in(model)
    assert after.keys() == left.keys() and all(after[key] is left[key] for key in left)


class Holds(nn.Module):
    """One attribute that a forward fills, and three that are no leftovers."""

    def __init__(self):
        super().__init__()
        self.left: torch.Tensor | None = None
        self.chosen = None
        self.chosen = torch.ones(2)
        self.table = torch.ones(3)
        self.name = None


def test_what_constructors_make_stays():
    module = Holds()
    module.left, module.name = torch.zeros(2), "set later"
    left, chosen, table = module.left, module.chosen, module.table
    with untouched(module):
        assert module.left is None and module.name == "set later"
        assert module.chosen is chosen and module.table is table
    assert module.left is left
