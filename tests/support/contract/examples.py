"""Properties tried on a few examples in the fast suite and on many in the slow one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings


def examples(few: int, many: int, *strategies: Any) -> Callable[[Callable], Callable]:
    """Makes a test of a function of what `strategies` draw."""

    def decorate(function: Callable) -> Callable:
        @pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])
        def test(count: int) -> None:
            settings(max_examples=count)(given(*strategies)(function))()

        test.__name__, test.__doc__ = function.__name__, function.__doc__
        test.__module__, test.__qualname__ = function.__module__, function.__qualname__
        return test

    return decorate
