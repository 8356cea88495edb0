"""What goes into an attention module's forward, and what comes out of its submodules."""

from __future__ import annotations

import functools
from typing import Any

import attrs
from torch import nn

from .pre_rope import given_arguments


@attrs.define(eq=False)
class Watched:
    """What happened in an attention module's forward so far.

    Attributes:
        name: its qualified name.
        arguments: of its forward, by name.
        outputs: of submodules, by qualified name, with their first input.
        hooks: on it.
    """

    name: str
    arguments: dict[str, Any] = attrs.field(factory=dict)
    outputs: dict[str, tuple[Any, Any]] = attrs.field(factory=dict)
    hooks: list[Any] = attrs.field(factory=list)


def watch(name: str, attention: nn.Module) -> Watched:
    """Watches an attention module until its `hooks` are removed."""
    seen = Watched(name)

    def begins(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.arguments = given_arguments(module, args, kwargs)
        seen.outputs = {}

    def ends(label: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.outputs[label] = output, (args[0] if args else None)

    seen.hooks.append(attention.register_forward_pre_hook(begins, with_kwargs=True))
    for label, module in attention.named_modules(prefix=name):
        if module is not attention:
            hook = functools.partial(ends, label)
            seen.hooks.append(module.register_forward_hook(hook))
    return seen
