"""The one number of a policy or budget that decides how much a cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import attrs

from ._fields import function, is_a
from ._names import named

Turned = TypeVar("Turned", covariant=True)
Other = TypeVar("Other")


@named
@attrs.frozen(kw_only=True)
class Knob(Generic[Turned]):
    """A number to turn: `at(x)` for x in [0, 1] is its value, and the cache never shrinks with x.

    `set(value)` is the policy, budget or pipeline with that value, `name` what is turned.
    """

    name: str = attrs.field(validator=is_a(str, "a name"))
    at: Callable[[float], float] = attrs.field(validator=function)
    set: Callable[[float], Turned] = attrs.field(validator=function)

    def map(self, change: Callable[[Turned], Other]) -> Knob[Other]:
        """The same number of something that holds what `set` gives."""
        return Knob(name=self.name, at=self.at, set=lambda value: change(self.set(value)))
