"""Running a model for a look, and leaving it as it was."""

from __future__ import annotations

import ast
import collections
import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (dict, list, set, collections.OrderedDict)
_CONVOLUTIONS: Any = getattr(torch.backends.cudnn, "conv")  # noqa: B009  # not in torch's types
_NAME = "_attn_implementation_internal"  # of a config, behind its property `_attn_implementation`


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients, products in full precision; puts all back afterwards.

    What earlier forwards left in modules, such as `rope_deltas` of a batch with images, is set
    aside meanwhile. Puts back modes, hooks, attributes, buffers, configs, RNG and grad mode: what
    is set on modules and configs, not what is written into a tensor in place.
    """
    modules = [(m, _shallow(m)) for m in model.modules()]
    named = [(c, c.__dict__.get(_NAME)) for c in configs_of(model)]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # Rounded products would hide what is compared.
    rounding = [(x, x.fp32_precision) for x in (torch.backends.cuda.matmul, _CONVOLUTIONS)]
    try:
        for backend, _ in rounding:
            backend.fp32_precision = "ieee"
        with torch.random.fork_rng(devices), torch.no_grad():
            # `train` of a user's module may do more than to set this.
            for module, _ in modules:
                module.training = False
                _set_aside(module)
            yield
    finally:
        for backend, before in rounding:
            backend.fp32_precision = before
        for module, before in modules:
            _put_back(module, before)
        for config, name in named:
            name_alone(config, name)


def configs_of(model: nn.Module) -> list[Any]:
    """All config objects in a model's modules, and the configs inside them."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in found or not hasattr(config, "_attn_implementation"):
            continue
        found[id(config)] = config
        waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


def name_alone(config: Any, name: str | None) -> None:
    """Names the attention of `config`, where its property would name that of configs inside too.

    These may be of towers, which keep theirs.
    """
    config.__dict__[_NAME] = name


@contextlib.contextmanager
def all_named(model: Any, name: str) -> Iterator[None]:
    """Names the attention of a model and of all its towers; each names its own again afterwards."""
    named = [(c, c.__dict__.get(_NAME)) for c in configs_of(model)]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, own in named:
            name_alone(config, own)


def _set_aside(module: nn.Module) -> None:
    """Empties what forwards leave in a module for the next: tensors that it was made without."""
    kept = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    if kept:
        vars(module).update(dict.fromkeys(set(kept) & _made_without(type(module))))


def _made_without(kind: type) -> set[str]:
    """Attributes to which the constructors of a class give None and nothing else."""
    given: dict[str, bool] = {}
    for part in kind.__mro__:
        if not issubclass(part, nn.Module) or "__init__" not in vars(part):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part.__init__)))
        except (OSError, TypeError, SyntaxError):  # made without a file
            continue
        for node in ast.walk(tree):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            for name in [x.attr for x in targets if isinstance(x, ast.Attribute)]:
                value = getattr(node, "value", None)
                none = isinstance(value, ast.Constant) and value.value is None
                given[name] = none and given.get(name, True)
    return {name for name, none in given.items() if none}


def _shallow(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; containers that it fills in place are copied, tensors are not."""
    return {
        name: type(value)(value) if type(value) in _CONTAINERS else value
        for name, value in vars(module).items()
    }


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    now: dict[str, Any] = vars(module)
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, value in before.items():
        current: Any = now.get(name)
        if type(value) in _CONTAINERS and type(current) is type(value):
            # Others may hold the container itself, such as the handle of a hook.
            current.clear()
            (current.extend if isinstance(current, list) else current.update)(value)
        else:
            now[name] = value
