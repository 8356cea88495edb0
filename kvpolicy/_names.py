"""Arguments by names that a class does not have: refused with the name to write instead."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ._fields import shown

Made = TypeVar("Made", bound=type)

# What other libraries call it: the names that it may have here. kvpress, the methods' own
# repositories, transformers' caches.
KNOWN = {
    "alpha_safeguard": ("floor",),
    "block_size": ("page_size",),
    "chunk_size": ("page_size",),
    "compression_ratio": ("budget", "sparsity", "ratio"),
    "head_compression_ratio": ("sparsity",),
    "heavy_ratio": ("budget",),
    "kernel_size": ("kernel",),
    "max_capacity_prompt": ("budget",),
    "max_cache_len": ("max_tokens",),
    "n_local": ("window",),
    "n_sink": ("sinks",),
    "num_sink_tokens": ("sinks",),
    "num_sinks": ("sinks",),
    "page_budget": ("budget",),
    "recent_size": ("window",),
    "safeguard": ("floor",),
    "sink_size": ("sinks",),
    "sliding_window": ("window",),
    "start_size": ("sinks",),
    "token_budget": ("budget",),
    "window_length": ("window",),
    "window_size": ("observation", "window"),
}

# What is not said to a policy, and where it is said.
ELSEWHERE = {
    "at_cap": "attach",
    "backend": "CachePipeline",
    "interval": "attach",
    "max_bytes": "attach",
    "max_tokens": "attach",
    "page_size": "attach",
    "rollback": "attach",
    "window": "CachePipeline",
}


def instead(name: str, value: Any, names: Sequence[str]) -> str:
    """What to write for an argument that is not one of `names`, or ""."""
    known = next((x for x in KNOWN.get(name, ()) if x in names), None)
    if known and "compression_ratio" in name:
        return _kept(known, value, names)
    near = difflib.get_close_matches(name, names, 1)
    if found := known or (near[0] if near else None):
        part = found == "budget" and isinstance(value, float)
        return f"; write {found}={f'Ratio({value:g})' if part else shown(value)}"
    other = next((x for x in (name, *KNOWN.get(name, ())) if x in ELSEWHERE), None)
    return f"; write {ELSEWHERE[other]}(..., {other}={shown(value)})" if other else ""


def _kept(name: str, value: Any, names: Sequence[str]) -> str:
    """A fraction that goes, as one that stays, or as streaming heads."""
    if name == "budget" and "when" not in names:
        return "; write budget=1024, the tokens that are read"
    if not isinstance(value, int | float) or not 0 <= value < 1:
        return f"; {name} is its name here"
    left = round(1 - value, 6)
    if name == "budget":
        return f"; write budget=Ratio({left:g}), the part that stays"
    if name == "ratio":
        return f"; write {left:g}, the part that stays"
    return f"; write {name}={value:g}"


def _by_name(title: str, names: Sequence[str], values: Sequence[Any]) -> str:
    """How positional values are written, as far as they tell which argument they are."""
    if not names:
        return ""
    if isinstance(values[0], int | float | str):
        return f"; write {title}({names[0]}={shown(values[0])})"
    return f"; write {title}({', '.join(f'{x}=...' for x in names[:3])})"


def named(kind: Made) -> Made:
    """A class whose `__init__` says what to write for unknown, missing and unnamed arguments."""
    made: Callable[..., None] = kind.__init__  # type: ignore[misc]
    signature = inspect.signature(made)
    parameters = list(signature.parameters.values())[1:]
    names = [x.name for x in parameters]
    by_place = sum(x.kind is not x.KEYWORD_ONLY for x in parameters)
    needed = [x.name for x in parameters if x.default is x.empty]
    title, reads = kind.__name__, hasattr(kind, "from_pretrained")
    made_from_files = f"; write {title}.from_pretrained(path)" if reads else ""

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            if name not in names:
                wanted = f"one of {', '.join(names)}" if names else f"no argument of {title}"
                hint = instead(name, value, names) or made_from_files
                raise TypeError(f"{name}: wanted {wanted}, got {name!r}{hint}")
        if len(args) > by_place:
            wanted = f"at most {by_place} positional" if by_place else "named"
            hint = _by_name(title, names[by_place:], args[by_place:])
            if reads and isinstance(args[0], str | os.PathLike):
                hint = f"; write {title}.from_pretrained({os.fspath(args[0])!r})"
            raise TypeError(
                f"{title}: wanted {wanted} arguments, got {len(args)} positional argument"
                f"{'s' if len(args) > 1 else ''}{hint}"
            )
        given = {*names[: len(args)], *kwargs}
        missing = next((x for x in needed if x not in given), None)
        if missing is not None:
            hint = made_from_files or f"; write {title}({missing}=...)"
            raise TypeError(f"{missing}: wanted an argument of this name, got none{hint}")
        made(self, *args, **kwargs)

    kind.__init__ = __init__  # type: ignore[misc]
    return kind
