"""Policies trained for small models, shipped with the package; see README.md beside this file."""

from __future__ import annotations

from pathlib import Path

from .._arguments import check_text
from ..admission._duo_file import PATTERN

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """What is shipped: write gates (`*.safetensors`) and folders with DuoAttention patterns."""
    gates = (path.name for path in _FOLDER.glob("*.safetensors"))
    patterns = (path.parent.name for path in _FOLDER.glob(f"*/{PATTERN}"))
    return sorted([*gates, *patterns])


def path(name: str) -> Path:
    """The file or folder of a shipped policy, for `from_pretrained`.

    Args:
        name: as `names()` lists it; `.safetensors` may be left out.

    Raises:
        FileNotFoundError: nothing of this name is shipped.

    Example:
        `WriteGate.from_pretrained(path("smollm2-135m-instruct-w64-keep25"))`
    """
    check_text("name", name, "a name of names()")
    shipped = names()
    for found in (name, f"{name}.safetensors"):
        if found in shipped:
            return _FOLDER / found
    raise FileNotFoundError(f"name: wanted one of {', '.join(shipped) or 'none'}, got {name!r}")
