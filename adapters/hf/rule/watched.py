"""What goes into an attention module's forward, and what comes out of its submodules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .pre_rope import given_arguments


@attrs.define(eq=False)
class Watched:
    """What happened in an attention module's forward so far.

    Attributes:
        name: its qualified name.
        arguments: of its forward, by name.
        outputs: of submodules, by qualified name, with their first input.
        modules: the submodules.
        hooks: on it.
        given: `[B, S, Hq, Dv]`, what attention gave in a call whose projection is looked for.
        ended: what is told the name of the submodule that projects it, or why there is none.
    """

    name: str
    arguments: dict[str, Any] = attrs.field(factory=dict)
    outputs: dict[str, tuple[Any, Any]] = attrs.field(factory=dict)
    modules: dict[str, nn.Module] = attrs.field(factory=dict)
    hooks: list[Any] = attrs.field(factory=list)
    given: Tensor | None = None
    ended: Callable[[str, str], None] | None = None

    def look_for_output(self, given: Tensor, ended: Callable[[str, str], None]) -> None:
        """Tells `ended`, when the module's forward is through, what projects `given`."""
        self.given, self.ended = given, ended

    def end(self) -> None:
        if self.given is None or self.ended is None:
            return
        flat = self.given.flatten(2)
        found = [
            name
            for name, (output, given) in self.outputs.items()
            if _is(given, flat) and isinstance(output, Tensor) and output.ndim == given.ndim
        ]
        found = [name for name in found if _is_affine(self.modules[name], flat)]
        # A module that wraps another is what the layer uses.
        name = min(found, key=lambda name: name.count("."), default="")
        reason = "no submodule projects what its attention gives, before anything changes it"
        self.ended(name, "" if name else reason)
        self.given = self.ended = None


def _is(given: Any, flat: Tensor) -> bool:
    if not isinstance(given, Tensor) or given.numel() != flat.numel():
        return False
    return given.shape[-1] == flat.shape[-1] and torch.equal(given.reshape(flat.shape), flat)


def _is_affine(module: nn.Module, x: Tensor) -> bool:
    """Whether a module's output grows with its input, up to a bias, as a norm's does not."""
    if hasattr(getattr(module, "weight", None), "placements"):
        return True  # one that is sharded over ranks; only projections are
    zero, once, twice = (module.forward(x * factor).float() for factor in (0, 1, 2))
    far = (twice - zero - 2 * (once - zero)).abs().max()
    return bool(far <= 0.1 * (once - zero).abs().max())


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
            seen.modules[label] = module
            seen.hooks.append(module.register_forward_hook(hook))
    seen.hooks.append(attention.register_forward_hook(lambda *given: seen.end()))
    return seen
