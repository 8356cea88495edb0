"""Tests of many cases for a GPU: all of them where there is one, one skipped item elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch


def on_gpu(names: str, cases: Iterable[Any], ids: Any = None) -> Callable[[Any], Any]:
    """Parametrizes a test as `pytest.mark.parametrize` does, and marks it for a GPU.

    Without one the first case stands for all, and the reason why it is skipped counts them:
    thousands of items that say the same take longer to collect and report than a hundred tests.
    """
    found, there = list(cases), torch.cuda.is_available()
    skip = pytest.mark.skipif(not there, reason=f"needs a CUDA device: {len(found)} cases")
    cut = pytest.mark.parametrize(names, found if there else found[:1], ids=ids)
    return lambda test: pytest.mark.gpu(skip(cut(test)))
