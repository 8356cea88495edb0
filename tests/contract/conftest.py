"""Small caches meet what large ones do."""

from __future__ import annotations

import pytest

from kvpolicy.store import numbers


@pytest.fixture(autouse=True)
def few_numbers_at_once(monkeypatch):
    """Room for numbers grows and shrinks within a few tokens."""
    monkeypatch.setattr(numbers, "STEP", 4)
