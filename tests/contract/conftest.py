"""Small caches meet what large ones do."""

from __future__ import annotations

import pytest

from kvpolicy.store import moments, numbers


@pytest.fixture(autouse=True)
def few_numbers_at_once(monkeypatch):
    """Room for numbers grows and shrinks within a few tokens."""
    monkeypatch.setattr(numbers, "STEP", 4)


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """Short sequences complete blocks of statistics, but where whole ones are looked at."""
    if request.module.__name__.rpartition(".")[2] != "test_asked":
        monkeypatch.setattr(moments, "BLOCK", 8)
        monkeypatch.setattr(moments, "SLACK", 4)
