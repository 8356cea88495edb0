"""Training on weights that `fully_shard` splits over ranks gives what whole weights give."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.training import keys_fingerprint
from tests.support.training.sharded import WAYS, train
from tests.support.training.small import make_model, make_tokenizer
from tests.support.two_ranks import run_two


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What two ranks found."""
    folder = tmp_path_factory.mktemp("sharded")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    run_two("tests.support.training.sharded", folder, ACCELERATE_USE_CPU="true")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """One process that takes the sequences of both."""
    return train(make_model(), 2)


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, "command line"])
def test_gates_are_those_of_whole_weights(parts, alone, way):
    gates, pattern, said = alone
    for part in parts:
        found, fingerprint, heads, metrics, as_before = part[way]
        for name, value in gates.gates.state_dict().items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
        assert fingerprint == gates.fingerprint == keys_fingerprint(make_model())
        torch.testing.assert_close(heads, pattern.heads, atol=1e-5, rtol=1e-5)
        assert metrics[-1]["keep"] == pytest.approx(said[-1]["keep"])
        assert {"accuracy", "accuracy_full"} <= metrics[-1]["hard"].keys()
        assert as_before, "the model computes something else after training"


@pytest.mark.slow
def test_caches_on_such_weights_are_refused(parts):
    for part in parts:
        kinds, said = zip(*part["refused"], strict=True)
        assert kinds == ("UnsupportedError",) * 3
        assert all("fully_shard" in x for x in said[:2]) and "whole weights" in said[2]
