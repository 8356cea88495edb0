"""Files of write gates in the layout that WG-KV publishes: the only reader and writer of them.

Weights of all layers are stacked under the names of `WriteGate`'s fields; a file holds a key per
layer and weight, in the shapes of grouped 1x1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .._files import open_safetensors, read_pt, replacing, write_pt
from . import _packed

_KEY = re.compile(r"model\.layers\.(\d+)\.self_attn\.g_predictors\..+")
# Name in the file, name of the field.
_NAMES = {
    "pre_key_norm.weight": "norm_pre",
    "post_key_norm.weight": "norm_post",
    "conv1.weight": "w1",
    "conv1.bias": "b1",
    "conv2.weight": "w2",
    "conv2.bias": "b2",
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _key(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.g_predictors.{name}"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The stacked fields of a `.pt` or `.safetensors` file, and its metadata.

    No value is read before names, dtypes, shapes and the file's size are found to agree.

    Raises:
        ValueError: the file is damaged, or not one of gates; the message names file and key.
    """
    _check_suffix(path)
    if path.suffix == ".pt":
        return stack(read_pt(path), str(path), path.stat().st_size), {}
    try:
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
            packing = metadata.pop(_packed.KEY, None)
            if packing not in (None, _packed.PACKING):
                raise ValueError(f"{path}: packing: wanted {_packed.PACKING!r}, got {packing!r}")
            beside = {_packed.EXPONENTS} if packing else set()
            _check_names(set(file.keys()) - beside, str(path))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if packing:
            state = _packed.unpack(state, str(path))
    except OSError:
        raise
    except Exception as error:  # of its own, and of torch where a dtype has no tensor
        if type(error) is ValueError:
            raise
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    return stack(state, str(path), None if packing else path.stat().st_size), metadata


def stack(state: object, source: str, size: int | None = None) -> dict[str, Tensor]:
    """The fields of published keys, stacked; `size` is that of a file, in bytes.

    Raises:
        ValueError: a key is missing, unexpected, misshapen or not finite; `source` names the place.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{source}: wanted a dict of tensors, got {type(state).__name__}")
    layers = _check_names(state, source)
    for name, value in state.items():
        _check_tensor(name, value, source)
    dim, heads = (state[_key(0, n)].numel() for n in ("pre_key_norm.weight", "conv2.bias"))
    width = state[_key(0, "conv1.bias")].numel() // max(heads, 1)
    shapes = {
        "pre_key_norm.weight": (dim,),
        "post_key_norm.weight": (dim,),
        "conv1.weight": (heads * width, 2 * dim, 1),
        "conv1.bias": (heads * width,),
        "conv2.weight": (heads, width, 1),
        "conv2.bias": (heads,),
    }
    first = state[_key(0, "conv1.weight")].dtype
    for n in range(layers):
        for name, shape in shapes.items():
            found = state[_key(n, name)]
            if tuple(found.shape) != shape or 0 in shape:
                raise ValueError(
                    f"{source}: {_key(n, name)}: wanted shape {shape}, got {tuple(found.shape)} "
                    f"(layer 0 has D={dim} in pre_key_norm.weight, Hkv={heads} in conv2.bias, "
                    f"m={width} in conv1.bias)"
                )
            if found.dtype != first:
                raise ValueError(
                    f"{source}: {_key(n, name)}: wanted {first} as in layer 0's conv1.weight, got "
                    f"{found.dtype}"
                )
    held = sum(value.numel() * value.element_size() for value in state.values())
    if size is not None and held > size:
        raise ValueError(
            f"{source}: its keys stand for {held:,} bytes, the file has {size:,}; tensors must not "
            "share or repeat their memory"
        )
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or infinite values")
    sizes = {"w1": (heads, width, 2 * dim), "b1": (heads, width), "w2": (heads, width)}
    stacked = {}
    for name, field in _NAMES.items():
        rows = torch.stack([state[_key(n, name)].detach() for n in range(layers)])
        stacked[field] = rows.view(layers, *sizes.get(field, shapes[name]))
    return stacked


def _check_names(names: Iterable[object], source: str) -> int:
    """The number of layers; raises ValueError unless each has all of its keys and nothing else."""
    found = dict.fromkeys(names)
    # Counting layers, rather than trusting the largest number, bounds what is expected.
    layers = len({match[1] for name in found if (match := _KEY.fullmatch(str(name)))})
    if not layers:
        raise ValueError(
            f"{source}: wanted a write gate, got a file that has no key like "
            f"{_key(0, 'conv1.weight')}"
        )
    wanted = {_key(n, name): None for n in range(layers) for name in _NAMES}
    for name in wanted:
        if name not in found:
            raise ValueError(f"{source}: missing key {name}")
    for other in found:
        if other not in wanted:
            raise ValueError(f"{source}: unexpected key {other}")
    return layers


def _check_tensor(name: str, value: object, source: str) -> None:
    kind = f"{type(value).__name__}"
    if isinstance(value, Tensor):
        kind = str(value.dtype)
        if value.layout != torch.strided or value.device.type != "cpu":
            kind = f"{value.layout} on {value.device}"
        elif value.dtype in _DTYPES:
            return
    raise ValueError(
        f"{source}: {name}: wanted a floating-point tensor of at least 16 bits, got {kind}"
    )


def named(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacked fields under the published keys, on the CPU; the inverse of `stack`."""
    layers, heads, width, double = fields["w1"].shape
    shapes = {"w1": (heads * width, double, 1), "b1": (heads * width,), "w2": (heads, width, 1)}
    state = {}
    for n in range(layers):
        for name, field in _NAMES.items():
            row = fields[field][n].detach()
            # A copy, so that every tensor of the file has a storage of its own.
            state[_key(n, name)] = row.reshape(shapes.get(field, row.shape)).cpu().clone()
    return state


def write(path: Path, fields: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes stacked fields in the published layout; a `.pt` file has no metadata."""
    _check_suffix(path)
    if path.suffix == ".pt":
        write_pt(path, named(fields))
        return
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file(named(fields), partial, metadata=metadata)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"path: wanted a name ending in .pt or .safetensors, got {str(path)!r}")
