"""The attention that config objects name while attachments hold it, and what they named before."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import UnsupportedError
from .faces import NAME
from .rule.probe import library
from .rule.untouched import name_alone

# Those in force; their attachments keep them alive.
_NAMED: weakref.WeakSet[ConfigNames] = weakref.WeakSet()
# Of each module outside an attached decoder that reads one of its configs.
_OUTSIDE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[ConfigNames]] = (
    weakref.WeakKeyDictionary()
)


class ConfigNames:
    """Ours, in the configs of a decoder and of its attention modules, not in configs inside these.

    Models may share a config object: the last attachment that holds it gives the name back. So may
    modules outside the decoder, which keep the attention that it named.
    """

    def __init__(self, base: nn.Module, decoder: nn.Module, layers: list[Any]) -> None:
        self.base, self.decoder, self.layers = base, decoder, layers
        # By id: the config and what it named before any attachment.
        self.before: dict[int, tuple[Any, str | None]] = {}

    def put(self) -> None:
        """Names our attention; `take_back` may be called whenever this broke off."""
        _NAMED.add(self)
        for config in self._found():
            self.before[id(config)] = config, self._named_before(config)
        for config, _ in self.before.values():
            name_alone(config, NAME)
        inside = set(self.decoder.modules())
        for module in self.base.modules():
            if module not in inside and id(getattr(module, "config", None)) in self.before:
                _OUTSIDE[module] = weakref.ref(self)

    def check_replaced(self) -> None:
        """Raises UnsupportedError for attention or masks in whose place ours would not be the same.

        Those of transformers all mean what the layers' kinds say; others may mean anything.
        """
        for config in self._found():
            name = self._named_before(config)
            kinds = (
                ("attention", ALL_ATTENTION_FUNCTIONS),
                ("masks", ALL_MASK_ATTENTION_FUNCTIONS),
            )
            for what, functions in kinds:
                function = functions.get((name or "").removeprefix("paged|"))
                if function is not None and library(function) != "transformers":
                    raise UnsupportedError(
                        f"attn_implementation: {name!r} names {what} that transformers did not "
                        "define, in whose place the pipeline's would run; where it means the "
                        "same, call set_attn_implementation('sdpa') before attach"
                    )

    def take_back(self) -> None:
        """Names what was named before, where no other attachment holds the config."""
        first = next((name for _, name in self.before.values()), None)
        for config, name in self.before.values():
            if self._sharing(config) is None:
                name_alone(config, name)
        for config in [*self._found(), self.base.config]:  # one that replaced ours meanwhile
            if id(config) not in self.before and config._attn_implementation == NAME:
                name_alone(config, first)
        for module in [module for module, names in _OUTSIDE.items() if names() is self]:
            del _OUTSIDE[module]
        _NAMED.discard(self)

    def check(self) -> None:
        """Raises UnsupportedError where a config names another attention by now."""
        for config in (self.decoder.config, *(config for config, _ in self.before.values())):
            name = config._attn_implementation
            if name != NAME:
                raise UnsupportedError(
                    f"attn_implementation: set to {name!r} while a pipeline is attached, whose "
                    "attention reads the cache; detach, set it, attach again"
                )

    def _found(self) -> list[Any]:
        """The config objects that name the attention of the decoder's layers."""
        holders = [self.decoder, *self.layers]
        found = {id(m.config): m.config for m in holders if hasattr(m, "config")}
        return list(found.values())

    def _sharing(self, config: Any) -> ConfigNames | None:
        """Another attachment's names, of a model with the same config object."""
        return next((x for x in _NAMED if x is not self and id(config) in x.before), None)

    def _named_before(self, config: Any) -> str | None:
        """The attention that `config` named before any attachment."""
        sharing = self._sharing(config)
        return config._attn_implementation if sharing is None else sharing.before[id(config)][1]


def outside(module: nn.Module) -> Callable[..., Any] | None:
    """The attention function of a module outside an attached decoder that reads a config of its.

    None for other modules.
    """
    held = _OUTSIDE.get(module)
    names = None if held is None else held()
    found = None if names is None else names.before.get(id(getattr(module, "config", None)))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if found is None or eager is None:
        return None
    function: Callable[..., Any] = AttentionInterface().get_interface(found[1] or "eager", eager)
    return function
