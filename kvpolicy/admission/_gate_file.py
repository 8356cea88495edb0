"""Files of write gates in the layout that WG-KV publishes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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


def _key(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.g_predictors.{name}"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The stacked fields of a `.pt` or `.safetensors` file, and its metadata."""
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    elif path.suffix == ".pt":
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path}: not a readable file of plain tensors: {error}") from error
    else:
        raise ValueError(f"{path}: wanted a file ending in .pt or .safetensors")
    return _stack(state, path), metadata


def _stack(state: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: wanted a dict of tensors, got {type(state).__name__}")
    # Counting layers, rather than trusting the largest number, bounds what is expected.
    layers = len({match[1] for name in state if (match := _KEY.fullmatch(str(name)))})
    if not layers:
        raise ValueError(f"{path}: no key like {_key(0, 'conv1.weight')}")
    wanted = {_key(n, name): None for n in range(layers) for name in _NAMES}
    for name in wanted:
        if name not in state:
            raise ValueError(f"{path}: missing key {name}")
    for name in state:
        if name not in wanted:
            raise ValueError(f"{path}: unexpected key {name}")
    for name, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path}: {name}: wanted a floating-point tensor, got {kind}")
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values")
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
    for n in range(layers):
        for name, shape in shapes.items():
            found = tuple(state[_key(n, name)].shape)
            if found != shape or 0 in shape:
                raise ValueError(
                    f"{path}: {_key(n, name)}: wanted shape {shape}, got {found} (layer 0 has "
                    f"D={dim} in pre_key_norm.weight, Hkv={heads} in conv2.bias, m={width} in "
                    "conv1.bias)"
                )
    sizes = {"w1": (heads, width, 2 * dim), "b1": (heads, width), "w2": (heads, width)}
    stacked = {}
    for name, field in _NAMES.items():
        rows = torch.stack([state[_key(n, name)].detach() for n in range(layers)])
        stacked[field] = rows.view(layers, *sizes.get(field, shapes[name]))
    return stacked


def write(path: Path, fields: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes stacked fields in the published layout; a `.pt` file has no metadata."""
    layers, heads, width, double = fields["w1"].shape
    shapes = {"w1": (heads * width, double, 1), "b1": (heads * width,), "w2": (heads, width, 1)}
    state = {}
    for n in range(layers):
        for name, field in _NAMES.items():
            row = fields[field][n].detach()
            # A copy, so that every tensor of the file has a storage of its own.
            state[_key(n, name)] = row.reshape(shapes.get(field, row.shape)).cpu().clone()
    if path.suffix == ".pt":
        torch.save(state, path)
    elif path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path, metadata=metadata)
    else:
        raise ValueError(f"path: wanted a name ending in .pt or .safetensors, got {str(path)!r}")
