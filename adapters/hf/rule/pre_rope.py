"""Keys before RoPE: from a submodule's output, or rotated back by the model's own cos and sin."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .records import PreRope, Rotation

Angles = tuple[Tensor, Tensor]


def key_before_rope(pre: PreRope, key: Tensor, kept: Any) -> Tensor:
    """The key before RoPE, `[B, Hkv, S, D]`.

    Args:
        pre: how it is had.
        key: the key that the model cached, `[B, Hkv, S, D]`.
        kept: what was kept of this forward: for form "module" the output of `pre.module`; for
            "rotate_back" what `rotation.keyword` or the output of `rotation.module` held, cos and
            sin; for "same" nothing is read.
    """
    if pre.form == "same":
        return key
    if pre.form == "module":
        return heads_of(kept, pre, key)
    assert pre.rotation is not None
    return rotated_back(pre.rotation, key, angles_of(kept))


def heads_of(output: Any, pre: PreRope, key: Tensor) -> Tensor:
    """The heads `[B, Hkv, S, D]` in a submodule's output; `key` has that shape."""
    batch, heads, columns, dim = key.shape
    if pre.element is not None:
        output = output[pre.element]
    if pre.heads_first:
        whole: Tensor = output
        return whole
    flat: Tensor = output.reshape(batch, columns, -1)
    taken: Tensor
    if pre.stride == dim:
        taken = flat.narrow(-1, pre.offset, heads * dim).unflatten(-1, (heads, dim))
    else:
        taken = flat.narrow(-1, pre.offset, (heads - 1) * pre.stride + dim)
        taken = taken.unfold(-1, dim, pre.stride)
    return taken.transpose(1, 2)


def angles_of(kept: Any) -> Angles:
    """cos and sin as a model holds them: a pair, or complex numbers."""
    if isinstance(kept, Tensor):
        return kept.real, kept.imag
    cos, sin = kept
    return cos, sin


def rotated_back(rotation: Rotation, x: Tensor, angles: Angles) -> Tensor:
    """`x` `[B, H, S, D]` before RoPE; cos and sin are `[B, S, R]`, `[S, R]` or half as wide.

    Scaled RoPE such as YaRN's multiplies cos and sin by a factor, which is divided out. Computed in
    float32 at least.
    """
    half = rotation.channels // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (per_pair(a, rotation).to(wide) for a in angles)
    size = cos * cos + sin * sin
    cos, sin = cos / size, -rotation.sign * sin / size
    start = x.shape[-1] - rotation.channels if rotation.tail else 0
    turning = x.narrow(-1, start, rotation.channels).to(wide)
    if rotation.interleaved:
        first, second = turning.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = turning.split(half, -1)
    pair = first * cos - second * sin, second * cos + first * sin
    out = torch.stack(pair, -1).flatten(-2) if rotation.interleaved else torch.cat(pair, -1)
    out = out.to(x.dtype)
    if rotation.channels == x.shape[-1]:
        return out
    rest = x.narrow(-1, 0 if rotation.tail else rotation.channels, x.shape[-1] - rotation.channels)
    return torch.cat([rest, out] if rotation.tail else [out, rest], -1)


def per_pair(angle: Tensor, rotation: Rotation) -> Tensor:
    """cos or sin of each pair of channels, `[B or 1, 1, S, R / 2]`."""
    half = rotation.channels // 2
    if angle.ndim == 4:  # with an axis for heads, at one of two places
        angle = angle.squeeze(2) if angle.shape[2] == 1 else angle.squeeze(1)
    if angle.shape[-1] != half:
        angle = angle[..., ::2] if rotation.repeated else angle[..., :half]
    return angle.unsqueeze(-3) if angle.ndim == 3 else angle[None, None]


def given_arguments(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a module's forward by name."""
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return kwargs
    return {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}


Keep = Callable[[Any], None]


def keep_for(model: Any, pre: PreRope, attention: nn.Module, keep: Keep) -> list[Any]:
    """Hooks that hand `keep` what `key_before_rope` wants, before the layer's attention runs.

    Returns the hooks' handles, whose `remove` takes them off.
    """
    rotation = pre.rotation
    name = pre.module if pre.form == "module" else (rotation.module if rotation else "")
    if name:
        source: nn.Module = model.get_submodule(name)
        return [source.register_forward_hook(lambda module, args, output: keep(output))]
    if pre.form == "rotate_back" and rotation is not None:

        def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            keep(given_arguments(module, args, kwargs)[rotation.keyword])

        return [attention.register_forward_pre_hook(before, with_kwargs=True)]
    return []
