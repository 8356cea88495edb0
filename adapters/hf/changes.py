"""Changes to a model, each with its undoing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT = object()


class Changes:
    """What was changed, in order.

    Each undoing is written down before its change and may run more than once, so that neither a
    change nor `undo` can be broken off in a way that a later `undo` does not mend.
    """

    def __init__(self) -> None:
        self._undoings: list[Callable[[], None]] = []

    def later(self, undoing: Callable[[], None]) -> None:
        """Writes down how a change that follows is undone."""
        self._undoings.append(undoing)

    def hook(self, module: nn.Module, function: Any, *, pre: bool = False, **how: bool) -> None:
        """Registers a forward hook, or one that runs before the forward."""
        self.later(functools.partial(_unhook, module, function))
        register = module.register_forward_pre_hook if pre else module.register_forward_hook
        register(function, **how)

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Sets an attribute of this one object."""
        before = module.__dict__.get(name, _ABSENT)
        self.later(functools.partial(_set, module, name, before))
        module.__dict__[name] = value

    def undo(self) -> None:
        """Takes everything back, the last change first."""
        while self._undoings:
            self._undoings[-1]()
            self._undoings.pop()


def _set(module: nn.Module, name: str, value: Any) -> None:
    if value is _ABSENT:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value


def _unhook(module: Any, function: Any) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook == function]:
            for also in (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                also.pop(key, None)
            del hooks[key]
