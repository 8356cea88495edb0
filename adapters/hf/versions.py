"""Which versions of transformers are served: another one is refused in one sentence."""

from __future__ import annotations

import transformers
from packaging.version import Version

# pyproject.toml says the same. 5.24 calls a forward's cache `cache`, no longer `past_key_values`.
FROM, BELOW = "5.17", "5.24"


def check(found: str) -> None:
    """Raises ImportError if `found` is not a served version of transformers."""
    if not Version(FROM) <= Version(Version(found).base_version) < Version(BELOW):
        raise ImportError(
            f"transformers: wanted a version from {FROM} and below {BELOW}, got {found}; "
            f"pip install 'transformers>={FROM},<{BELOW}'"
        )


check(transformers.__version__)
