"""What a file calls each class, and which classes a file may name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from .. import admission, budget, eviction, selection
from .._fields import shown
from ..budget._wrapper import Scaled
from ..per_layer import PerLayerAdmission, PerLayerEviction, PerLayerSelection, per_layer

ROOMS = (admission, selection, eviction, budget)
BASES = (admission.Admission, selection.Selection, eviction.Eviction, budget.Budget)
PER_LAYER = "per_layer"


def is_policy(value: Any) -> bool:
    """Whether `value` is a class of policies or budgets that can be made."""
    kind = isinstance(value, type) and issubclass(value, BASES)
    return kind and not inspect.isabstract(value)


def _known() -> dict[str, type]:
    """The library's classes by their names; combinators by those of their functions."""
    found = {
        name: value for room in ROOMS for name, value in vars(room).items() if is_policy(value)
    }
    found |= {"any_of": found.pop("AnyOf"), "all_of": found.pop("AllOf"), "Scaled": Scaled}
    return found


KNOWN = _known()
_NAMES: dict[type, str] = {kind: name for name, kind in KNOWN.items()}
_NAMES |= dict.fromkeys((PerLayerAdmission, PerLayerSelection, PerLayerEviction), PER_LAYER)


def name_of(kind: type) -> str:
    """What a file calls `kind`: its name in kvpolicy, else `module:object`.

    Raises:
        ValueError: no other program could import it.
    """
    if kind in _NAMES:
        return _NAMES[kind]
    module, name = kind.__module__, kind.__qualname__
    if module == "__main__" or "<locals>" in name:
        raise ValueError(
            f"wanted a class that a module holds, got {module}:{name}, which a file cannot name"
        )
    return f"{module}:{name}"


def named(name: Any, trust_code: bool) -> Callable[..., Any]:
    """The class, or the function `per_layer`, that a file's `type` names.

    Raises:
        ValueError: it is none of kvpolicy's and code is not trusted, or there is no such module.
        TypeError: it is no policy, budget or combinator.
    """
    if not isinstance(name, str):
        raise TypeError(f"type: wanted the name of a policy or budget, got {shown(name)}")
    if name == PER_LAYER:
        return per_layer
    if name in KNOWN:
        return KNOWN[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        known = [*KNOWN, PER_LAYER]
        near = difflib.get_close_matches(name, known, 1)
        hint = f'; write "{near[0]}"' if near else ""
        wanted = f"one of {', '.join(known)}, or module:object"
        raise ValueError(f"type: wanted {wanted}, got {shown(name)}{hint}")
    if not trust_code:
        raise ValueError(
            f"type: {shown(name)} is no policy of kvpolicy, and naming it imports code; if you "
            "trust it, pass trust_code=True (on the command line --trust-code)"
        )
    return _imported(module, attribute)


def _imported(module: str, attribute: str) -> Callable[..., Any]:
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        wanted = f"type: wanted a module's object, got {module}:{attribute}"
        raise ValueError(f"{wanted}: {error}") from error
    if not is_policy(found):
        raise TypeError(
            f"type: wanted a class of policies, budgets or combinators, got {module}:{attribute}, "
            f"which is {shown(found)}"
        )
    made: Callable[..., Any] = found
    return made
