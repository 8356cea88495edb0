"""Tiny models, without gradients."""

from __future__ import annotations

import pytest
import torch

from tests.support.adapters.models import KINDS, tiny


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=KINDS)
def model(request):
    return tiny(request.param)


@pytest.fixture
def llama():
    return tiny("llama")


@pytest.fixture
def qwen3():
    return tiny("qwen3")
