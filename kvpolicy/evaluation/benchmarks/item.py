"""A question of a benchmark, as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs


def _texts(value: Any) -> tuple[str, ...]:
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return tuple(str(x) for x in (value if several else (value,)))


@attrs.frozen(kw_only=True)
class Item:
    """One question about a context.

    `task` names the part of a benchmark that it belongs to, `answers` are its references, `lead`
    is how the reply starts, `new_tokens` how long it may be. `about` holds what a scorer may want
    besides, such as the choices or the classes. Questions with equal contexts share a prefill.
    """

    task: str
    context: str
    question: str
    answers: tuple[str, ...] = attrs.field(converter=_texts)
    lead: str = ""
    new_tokens: int = 64
    about: Mapping[str, Any] = attrs.field(factory=dict)


def by_context(items: Iterable[Item]) -> list[list[Item]]:
    """The items of each context, contexts in the order in which they come."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.context, []).append(item)
    return list(found.values())
