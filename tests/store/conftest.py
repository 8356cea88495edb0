"""A saved cache to load; helpers of these tests importable by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from saved import PIPELINE, filled

from kvpolicy.store import save


@pytest.fixture
def path(tmp_path):
    save(filled(), tmp_path / "cache", PIPELINE, fingerprint="model")
    return tmp_path / "cache"
