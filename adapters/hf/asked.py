"""What evictions ask of a model's layers: output projections, and how RoPE turns."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ...calls.tell import Known
from ...errors import UnsupportedError
from ...rope import Rope
from .models import AttentionLayer, Served
from .rule.records import Rotation

_CLOSE = 2e-2  # of a frequency, as cos and sin in 16 bits show it
_CHANGING = ("dynamic", "longrope")  # kinds of RoPE whose frequencies depend on the length


def known_of(model: nn.Module, known: Served, reads: frozenset[str]) -> dict[int, Known]:
    """What `CachePipeline.tell` takes, by layer, of what policies read.

    Raises UnsupportedError for a layer of which it cannot be had.
    """
    found: dict[int, Known] = {}
    for index, layer in enumerate(known.layers):
        if layer.window is not None:
            continue
        told = Known()
        if "output_weight" in reads:
            told["output_weight"] = _output(index, layer)
        if "rope" in reads:
            told["rope"] = rope_of(model, index, layer)
        if told:
            found[index] = told
    return found


def _output(index: int, layer: AttentionLayer) -> Any:
    if layer.output is None:
        raise UnsupportedError(
            f"output_weight: the output projection, which the policy reads, cannot be had in layer "
            f"{index} ({type(layer.module).__name__}): {layer.no_output}"
        )
    return functools.partial(
        output_weight, layer.output, layer.heads, layer.value_dim, layer.dtype, layer.device
    )


@torch.no_grad()
def output_weight(
    module: nn.Module, heads: int, value_dim: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weight `[heads, value_dim, hidden]` of a projection, a view where it lies there plainly.

    One that is quantised, offloaded, adapted or laid out otherwise is read off what the module
    makes of the unit vectors, less its bias; hooks of others do not run. A tensor-parallel rank
    has its heads' part.
    """
    weight: Any = getattr(module, "weight", None)
    columns = heads * value_dim
    if hasattr(weight, "placements"):
        weight = weight.to_local()
    elif not _is_plain(module):
        units = torch.eye(columns, dtype=dtype, device=device)
        made: Tensor = module.forward(units) - module.forward(torch.zeros_like(units[:1]))
        return made.view(heads, value_dim, -1)
    found: Tensor = weight.detach().view(-1, heads, value_dim).permute(1, 2, 0)
    return found


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type != "meta"
    )


def rope_of(model: nn.Module, index: int, layer: AttentionLayer) -> Rope | None:
    """How a layer turns, with the exact frequencies that the model holds where it holds them."""
    rule = layer.pre_query
    if rule is not None and rule.form == "same":
        return None

    def refuse(reason: str) -> UnsupportedError:
        return UnsupportedError(
            f"rope: how RoPE turns, which the policy reads, cannot be known in layer {index} "
            f"({type(layer.module).__name__}): {reason}"
        )

    if rule is None or rule.rotation is None:
        raise refuse(layer.no_pre_query)
    rotation = rule.rotation
    if not rotation.turns:
        raise refuse("its positions have several axes")
    held, owner = _held(model, rotation.turns)
    kinds = getattr(owner, "rope_type", "")
    kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    if any(kind in _CHANGING for kind in kinds):
        raise refuse(f"its frequencies change with the length ({', '.join(map(str, kinds))})")
    if held is None and layer.dtype.itemsize < 4:
        raise refuse("no buffer holds its frequencies, and cos and sin have 16 bits")
    return _made(rotation, rotation.turns if held is None else held)


def _held(
    model: nn.Module, turns: tuple[float, ...]
) -> tuple[tuple[float, ...] | None, nn.Module | None]:
    """The buffer nearest to frequencies that were seen, and its module; None if none is near."""
    seen, best = torch.tensor(turns, dtype=torch.float64), _CLOSE
    found: tuple[tuple[float, ...] | None, nn.Module | None] = (None, None)
    for module in model.modules():
        for buffer in module.buffers(recurse=False):
            if buffer.shape != seen.shape or not buffer.is_floating_point():
                continue
            if buffer.device.type == "meta":
                continue
            values = buffer.detach().double().cpu()
            far = float(((values - seen).abs() / seen.abs().clamp(min=1e-12)).max())
            if far < best:
                best, found = far, (tuple(values.tolist()), module)
    return found


def _made(rotation: Rotation, turns: tuple[float, ...]) -> Rope:
    return Rope(
        frequencies=turns,
        interleaved=rotation.interleaved,
        tail=rotation.tail,
        sign=rotation.sign,
        factor=rotation.factor,
    )
