"""What `evaluate` measures by name, and the record of what it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.grid.variants import Variant


def chosen(variants: list[Variant], starts: Sequence[str] | None) -> list[Variant]:
    """Variants of these names, or whose names start so where none has the name itself.

    Those whose sizes they match come with them.
    """
    if not starts:
        return variants
    names = {x.name for x in variants}
    parts = tuple(x for x in starts if x not in names)
    chosen = [x for x in variants if x.name in starts or x.name.startswith(parts)]
    unknown = [start for start in parts if not any(x.name.startswith(start) for x in chosen)]
    if unknown:
        # Their sizes are left out: many methods have a dozen.
        known = (x.family if x.name.startswith(x.family) else x.name for x in variants)
        raise ValueError(
            f"variant: wanted the start of one of {', '.join(dict.fromkeys(known))}, with its size "
            f"or without; got {', '.join(unknown)}"
        )
    sizes = {x.matches for x in chosen}
    return [x for x in variants if x in chosen or x.name in sizes]


def digest(file: Path) -> str:
    """A file's name and the start of its hash."""
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"


def made_with(model: Any) -> dict[str, str]:
    """Versions and the device, for the record."""
    import importlib.metadata
    import platform

    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("kvpolicy", "transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    on = model.device
    found["device"] = torch.cuda.get_device_name(on) if on.type == "cuda" else str(on)
    return found
