"""Pipelines and policies of a user's own, from a file or a module."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipeline import CachePipeline


def own_pipeline(name: str, trust_code: bool = False) -> CachePipeline:
    """A file's pipeline, or `module:name`; modules of the current folder are found as well."""
    from ..pipeline import CachePipeline
    from ..pipeline_files import is_file_name, load_pipeline

    if os.getcwd() not in sys.path and (trust_code or not is_file_name(name)):
        sys.path.insert(0, os.getcwd())
    if is_file_name(name):
        return load_pipeline(name, trust_code=trust_code)
    found = _object(name, "pipeline", "a .json or .yaml file or ")
    if not isinstance(found, CachePipeline):
        raise TypeError(f"pipeline: wanted a CachePipeline in {name}, got {found!r}")
    return found


def own_policy(name: str, window: int) -> CachePipeline:
    """A pipeline `module:object`, or that of an admission, selection or eviction by itself.

    The window is `window` where the policy has none of its own.
    """
    from ..admission import Admission
    from ..eviction import Eviction
    from ..pipeline import CachePipeline
    from ..selection import Selection

    found = _object(name, "policy")
    if isinstance(found, CachePipeline):
        return found
    slots = {"admission": Admission, "selection": Selection, "eviction": Eviction}
    for slot, kind in slots.items():
        if isinstance(found, kind):
            own = getattr(found, "window", None), getattr(found, "prefers_window", None)
            options: dict[str, Any] = {slot: found, "window": None if any(own) else window}
            return CachePipeline(**options)
    raise TypeError(f"policy: wanted a policy or a CachePipeline in {name}, got {found!r}")


def _object(name: str, option: str, instead: str = "") -> Any:
    """What `module:name` names; modules of the current folder are found as well."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{option}: wanted {instead}module:name, got {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name != module:  # one that the module imports
            raise
        raise ValueError(
            f"{option}: there is no module {module!r} in this folder or among the installed ones; "
            f"wanted {instead}module:name"
        ) from error
