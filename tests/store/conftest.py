"""A saved cache to load."""

from __future__ import annotations

import pytest

from kvpolicy.store import save
from tests.support.store.saved import PIPELINE, filled


@pytest.fixture
def path(tmp_path):
    save(filled(), tmp_path / "cache", PIPELINE, fingerprint="model")
    return tmp_path / "cache"
