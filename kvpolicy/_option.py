"""What a policy may say of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    option = property
else:

    class option:  # noqa: N801
        """A read-only property that an attribute of a subclass or an instance replaces.

        A policy says `window = 8`, `window: int` as a field of any frozen class, or a property.
        """

        def __init__(self, default: Callable[[Any], Any]) -> None:
            self._default, self.__doc__ = default, default.__doc__

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            return self._default(instance)  # a class has the default, as an attribute would say
