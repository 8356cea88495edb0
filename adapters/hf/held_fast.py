"""What a CUDA graph of a model holds as it was when it was captured."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def held_fast(model: Any) -> list[Any]:
    """What a graph of `model` holds as it was at its capture: where weights lie, which of PEFT's
    adapters take part, which hooks of others run. Values that change in place are none of it.
    """
    return HeldFast(model).seen


class HeldFast:
    """What a graph of a model holds, and whether it is `still` so.

    `hooked` where hooks of others run, which a graph leaves out.
    """

    def __init__(self, model: Any) -> None:
        self.modules, self.hooked = list(model.modules()), False
        self.seen = self._look()

    def still(self) -> bool:
        return self._look() == self.seen

    def _look(self) -> list[Any]:
        found: list[Any] = []
        for module in self.modules:
            own = module.__dict__
            found.append(len(own["_modules"]))
            for kind in ("_parameters", "_buffers"):
                found += [_place(x) for x in own[kind].values() if x is not None]
            found += map(id, own["_modules"].values())
            for hooks in (own["_forward_pre_hooks"], own["_forward_hooks"]):
                for n, hook in hooks.items():
                    if not _is_ours(hook):
                        found.append(n)
                        self.hooked = True
            if "forward" in own:  # patched, or wrapped
                found.append(id(own["forward"]))
            if hasattr(module, "merged_adapters"):
                found.append((tuple(module.active_adapters), bool(module.disable_adapters)))
                found.append((tuple(module.merged_adapters), str(getattr(module, "scaling", None))))
        return found


def _place(x: Tensor) -> int:
    try:
        return x.to_local().data_ptr() if isinstance(x, DTensor) else x.data_ptr()
    except RuntimeError:  # of a subclass without a storage of its own
        return id(x)


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(__name__.rpartition(".")[0])
