"""Tests of what only the newest transformers has, or has in this way."""

from __future__ import annotations

import pytest
import transformers
from packaging import version

NEWEST = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"),
    reason="earlier versions of transformers build, name or refuse these types otherwise",
)
