"""Tiny models, without gradients."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.adapters.hf import compile as compiling
from tests.support.adapters.models import KINDS, tiny


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def short_prompts_compiled(monkeypatch):
    """As long ones are: the prompts of tests are short."""
    monkeypatch.setattr(compiling, "FEW", 0)


@pytest.fixture(params=KINDS)
def model(request):
    return tiny(request.param)


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture
def qwen3():
    return tiny("qwen3")
