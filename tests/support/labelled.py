"""Devices that are labels: tensors that compute on the CPU and refuse to meet those of another.

A stand-in for a host with several GPUs. Inside `Labels()`, a tensor on ONE or TWO lies in the
host's memory, says that it is on that device, and every operator that torch would refuse between
devices raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

KIND = "privateuseone"  # a kind that torch leaves to others
ONE, TWO = (torch.device(KIND, n) for n in range(2))
without_labels = ""  # why there are none
try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as _setup

    _setup()
    # Outside nobody finds a device of this kind, as DataParallel would.
    torch.get_device_module(KIND).is_available = lambda: Labels.entered > 0
except ImportError:
    without_labels = "this torch takes no device from Python"
_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default, _aten._foreach_copy_.default}
# Their indices may lie on the CPU.
_INDEXING = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default,
    _aten._index_put_impl_.default,
}  # fmt: skip


class Labelled(Tensor):
    """A CPU tensor `raw` that says that it is on `on`."""

    raw: Tensor
    on: torch.device

    @staticmethod
    def __new__(cls, raw: Tensor, on: torch.device | None = None, **options: Any) -> Any:
        if on is None:  # accelerate makes parameters anew by their class
            return nn.Parameter(raw, **options)
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=on,
        )  # fmt: skip
        made.raw, made.on = raw, on
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.raw!r} on {self.on}"

    def tolist(self) -> Any:
        return self.raw.tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return Labelled(self.raw.new_tensor(data, **options), self.on)

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


class Labels(TorchDispatchMode):
    """Lets factories make tensors on labels."""

    entered = 0

    def __enter__(self) -> Any:
        Labels.entered += 1
        # torch.tensor makes its values on the CPU first, and moves them where modes see it.
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        Labels.entered -= 1
        super().__exit__(*exc)
        torch._C._set_only_lift_cpu_tensors(self.before)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(op, args, kwargs or {})


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on what lies behind labels."""
    flat, spec = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    found = {x.on for x in tensors if isinstance(x, Labelled)}
    if op not in _COPIES:
        _check(op, tensors, found)
    wanted = kwargs.get("device")
    at = next(iter(found), None)
    if op in _COPIES and isinstance(args[0], Tensor):
        at = args[0].on if isinstance(args[0], Labelled) else None
    if wanted is not None:
        at = torch.device(wanted)
        at = None if at.type != KIND else torch.device(KIND, at.index or 0)
        kwargs_at = [i for i, x in enumerate(flat) if isinstance(x, torch.device)]
        for i in kwargs_at:
            flat[i] = torch.device("cpu") if flat[i].type == KIND else flat[i]
    raws = [x.raw if isinstance(x, Labelled) else x for x in flat]
    own = {id(x.raw): x for x in tensors if isinstance(x, Labelled)}
    given = {id(x) for x in tensors if not isinstance(x, Labelled)}
    raw_args, raw_kwargs = tree_unflatten(raws, spec)
    out = op(*raw_args, **raw_kwargs)

    def labelled(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in given and op not in _COPIES:
            return x
        if id(x) in own and own[id(x)].on == at:
            return own[id(x)]
        if x.device.type == "meta" or at is None:
            return x
        return Labelled(x, at)

    return tree_map(labelled, out)


def _check(op: Any, tensors: list[Tensor], found: set[torch.device]) -> None:
    """Raises as torch does for tensors of several devices; numbers on the CPU go with all."""
    places = set(found)
    for place, x in enumerate(tensors):
        free = x.ndim == 0 or (op in _INDEXING and place)
        if not isinstance(x, Labelled) and x.device.type == "cpu" and not free:
            places.add(x.device)
    if len(places) > 1:
        said = ", ".join(sorted(map(str, places)))
        raise RuntimeError(f"{op}: tensors on several devices, {said}")


def spread(model: Any, devices: list[torch.device]) -> Any:
    """`model` with a device for each layer, embeddings on the first, all else on the last.

    What a layer is given is moved to it, as accelerate's hooks do, and logits go to the first.
    """
    decoder = model.model
    for layer, device in zip(decoder.layers, devices, strict=True):
        _put(layer, device)
    for name, child in decoder.named_children():
        if name != "layers":
            _put(child, devices[-1] if name in ("norm", "embedding_norm") else devices[0])
    _put(model.lm_head, devices[-1])
    model.register_forward_hook(lambda m, args, out: _logits_to(out, devices[0]))
    return model


def _put(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, x in list(part._parameters.items()):
            if x is not None:
                moved = x.detach().to(device)
                part._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, x in list(part._buffers.items()):
            if x is not None:
                part._buffers[name] = x.to(device)

    def moved(x: Any) -> Any:
        return x.to(device, non_blocking=False) if hasattr(x, "to") else x

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(moved, (args, kwargs))

    module.register_forward_pre_hook(before, with_kwargs=True)


def _logits_to(out: Any, device: torch.device) -> Any:
    if getattr(out, "logits", None) is not None:
        out.logits = out.logits.to(device)
    return out
