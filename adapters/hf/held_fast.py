"""What a CUDA graph of a model holds as it was when it was captured."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_PLAIN = (Tensor, nn.Parameter)
_GLOBAL = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
)
_KNOWN = __name__.rpartition(".")[0], "transformers.utils.output_capturing"
HOOKED = "hooks of others run, which a graph would leave out"


class HeldFast:
    """Where a model's weights lie, which of PEFT's adapters take part, which hooks of others run.

    `still` says whether all is as it was; values that change in place are none of it. `hooked`
    where hooks of others run, torch's global ones included: a graph would run none of them.
    """

    def __init__(self, model: Any) -> None:
        own = [module.__dict__ for module in model.modules()]
        # Dicts that torch and PEFT change in place: looking must cost less than what it saves.
        self._modules = [x["_modules"] for x in own]
        self._tensors = [x[kind] for x in own for kind in ("_parameters", "_buffers")]
        self._hooks = hooks_of(model)
        self._tuned = [m for m in model.modules() if hasattr(m, "merged_adapters")]
        self._own, self.hooked = own, False
        self.seen = self._look()

    def still(self) -> bool:
        return self._look() == self.seen

    def _look(self) -> list[Any]:
        found: list[Any] = [id(x) for held in self._modules for x in held.values()]
        found += [_place(x) for held in self._tensors for x in held.values() if x is not None]
        others = others_in(self._hooks)
        self.hooked = bool(others)
        found += others
        # Patched, or wrapped.
        found += [id(x["forward"]) for x in self._own if "forward" in x]
        for module in self._tuned:
            found.append((tuple(module.active_adapters), bool(module.disable_adapters)))
            found.append((tuple(module.merged_adapters), str(getattr(module, "scaling", None))))
        return found


def hooks_of(model: nn.Module) -> list[Any]:
    """The dicts of forward hooks that run in a forward of a model, torch's global ones first."""
    kinds = "_forward_pre_hooks", "_forward_hooks"
    return [*_GLOBAL, *(module.__dict__[kind] for module in model.modules() for kind in kinds)]


def others_in(hooks: list[Any]) -> list[int]:
    """The hooks of others among those of `hooks_of`."""
    return [n for held in hooks if held for n, hook in held.items() if not _known(hook)]


def _place(x: Tensor) -> int:
    if type(x) in _PLAIN:
        return x.data_ptr()
    try:
        return x.to_local().data_ptr() if isinstance(x, DTensor) else x.data_ptr()
    except RuntimeError:  # of a subclass without a storage of its own
        return id(x)


def _known(hook: Any) -> bool:
    """Whether a hook is ours, or of transformers, whose own keep what only eager steps ask for."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(_KNOWN)
