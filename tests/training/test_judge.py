"""Training of Judge Q's tokens: the maps come together and the model stays as it was."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate")

from kvpolicy.evaluation.models import tiny_llama
from kvpolicy.training import train_judge


def test_training_brings_the_maps_together_and_changes_no_model():
    model, losses = tiny_llama(layers=2), []
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rng = torch.Generator().manual_seed(1)
    samples = [
        (torch.randint(2, 500, (40,), generator=rng), torch.randint(2, 500, (6,), generator=rng))
    ]
    options = {"tokens": 4, "steps": 25, "learning_rate": 0.01}
    found = train_judge(model, samples, told=lambda step, loss: losses.append(loss), **options)
    assert found.shape == (4, model.config.hidden_size) and not found.requires_grad
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(found, train_judge(model, samples, **options))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.config._attn_implementation != "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens: wanted at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: wanted a number above 0"),
        ({"samples": []}, "samples: wanted at least one context"),
    ],
)
def test_arguments_without_a_meaning_are_refused(options, message):
    given = {"samples": [(torch.ones(4).long(), torch.ones(2).long())]} | options
    with pytest.raises(ValueError, match=message):
        train_judge(tiny_llama(layers=1), **given)
