"""A probe for models that cannot run here: a random model of the same config, cut and narrow."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import torch
from torch import nn

from .kinds import LayerKind, layer_kinds, text_config
from .records import ModelRefused, PreRope, Probe, ProbedLayer
from .tiny_sizes import CHOSEN, EXPERTS, INNER_SIZES

VOCAB = 1024


def cut_config(config: Any) -> tuple[Any, int]:
    """A narrow config of the first layers that have every kind, and how many these are.

    What attention computes on stays: heads, head dims, windows, scales. What is narrow are the
    vocabulary, the inner layers, experts and, where heads have a size of their own, the residual
    stream.
    """
    kinds = layer_kinds(config)
    alike = _alike(text_config(config), kinds)
    count = 1 + max(alike.index(sort) for sort in set(alike))
    cut = _cut(config, count)
    if count < len(kinds) and layer_kinds(cut) != kinds[:count]:
        count = len(kinds)  # kinds that are counted from the last layer
        cut = _cut(config, count)
    return cut, count


def whole(model: Any, found: Probe, reason: str) -> Probe:
    """What a probe of the cut model, `found`, says of the layers of `model` itself.

    Raises ModelRefused where the layers are not named alike.
    """
    kinds = layer_kinds(model.config)
    alike = _alike(text_config(model.config), kinds)
    layers = []
    for index in range(len(kinds)):
        for layer in found.layers:
            if layer.layer == alike.index(alike[index]):
                layers.append(_moved(model, layer, index, alike))
    counting = [n for n in range(len(kinds)) if alike.index(alike[n]) in found.counting]
    return attrs.evolve(
        found, layers=tuple(layers), kinds=kinds, way="cut", reason=reason,
        counting=tuple(counting),
    )  # fmt: skip


def cut_model(model: Any) -> nn.Module:
    """The random model of the same class, on the CPU in float32."""
    config, _ = cut_config(model.config)
    with torch.random.fork_rng([]), torch.device("cpu"):
        made: nn.Module = type(model)._from_config(config, dtype=torch.float32)
    return made.float().eval()


def why_not_in_place(model: nn.Module) -> str:
    """What of a model's weights may keep it from running as it is; "" if nothing."""
    devices = {weight.device.type for weight in model.parameters()}
    if "meta" in devices or any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "its layers are offloaded"
    if getattr(model, "hf_quantizer", None) is not None:
        return "its weights are quantised"
    weights = [getattr(module, "weight", None) for module in model.modules()]
    if any(hasattr(weight, "placements") for weight in weights):
        return "its weights are sharded"
    if len({weight.dtype for weight in model.parameters()}) > 1:
        return "its weights have several dtypes"
    return ""


def _alike(config: Any, kinds: tuple[LayerKind, ...]) -> list[tuple[str, ...]]:
    """For each layer, what the config says of it alone; equal for layers that are alike."""
    lists = [
        value
        for name, value in sorted(config.to_dict().items())
        if isinstance(value, (list, tuple)) and len(value) == len(kinds) and not _numbers(value)
    ]
    return [
        (repr(kind), *(repr(value[layer]) for value in lists)) for layer, kind in enumerate(kinds)
    ]


def _numbers(values: Any) -> bool:
    """Whether a list holds the numbers of layers rather than something of each."""
    return all(type(a) is int for a in values) and list(values) == sorted(set(values))


def _cut(config: Any, count: int) -> Any:
    cut = copy.deepcopy(config)
    for holder in {id(c): c for c in (cut, text_config(cut))}.values():
        holder.__dict__.pop("quantization_config", None)
    text = text_config(cut)
    before = text.num_hidden_layers
    held = text.to_dict()
    for name, value in held.items():
        size = VOCAB if name.startswith("vocab_size") else INNER_SIZES.get(name, 0)
        if isinstance(value, (list, tuple)) and len(value) == before:
            kept = list(value[:count])
            setattr(text, name, [min(x, size) for x in kept] if size else kept)
        elif size and type(value) is int and value > size:
            setattr(text, name, size)
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            setattr(text, name, None)
    experts = [name for name in EXPERTS if type(held.get(name)) is int]
    for name in experts:
        chosen = max([2, *(held[x] for x in CHOSEN if type(held.get(x)) is int)])
        groups = held.get("n_group") or 1
        setattr(text, name, min(held[name], groups * -(-2 * chosen // groups)))
    text.num_hidden_layers = count
    own = held.get("head_dim")
    if isinstance(own, int) and own * text.num_attention_heads != text.hidden_size:
        text.hidden_size = min(text.hidden_size, 8 * text.num_attention_heads)
    return cut


def _moved(model: Any, layer: ProbedLayer, index: int, alike: list[tuple[str, ...]]) -> ProbedLayer:
    """The record of a cut layer for another one that is like it, with all heads."""
    name = _renamed(layer.module, layer.layer, index)
    modules = dict(model.named_modules())
    if name not in modules:
        raise ModelRefused(
            f"it cannot run here, and its layers are not named by their number: no {name}",
            check="forward",
            layer=index,
        )
    reads = index
    if layer.shared:  # the last layer before that stores, of the kind that the cut one reads
        reads = max(n for n in range(index) if alike[n] == alike[layer.reads])
    weights = [w for w in modules[name].parameters() if w.is_floating_point() and w.itemsize > 1]
    return attrs.evolve(
        layer,
        module=name,
        layer=index,
        reads=reads,
        pre_rope=_pre_renamed(layer.pre_rope, layer.layer, index),
        pre_query=_pre_renamed(layer.pre_query, layer.layer, index),
        output=_renamed(layer.output, layer.layer, index),
        hidden=layer.hidden * _stream(model.config) // _stream(cut_config(model.config)[0]),
        dtype=weights[0].dtype if weights else text_config(model.config).dtype,
        device=weights[0].device if weights else layer.device,
    )


def _stream(config: Any) -> int:
    """Channels of the residual stream, which may be cut."""
    return getattr(text_config(config), "hidden_size", None) or 1


def _pre_renamed(pre: PreRope | None, before: int, after: int) -> PreRope | None:
    if pre is None:
        return None
    rotation = pre.rotation
    if rotation is not None:
        rotation = attrs.evolve(rotation, module=_renamed(rotation.module, before, after))
    return attrs.evolve(pre, module=_renamed(pre.module, before, after), rotation=rotation)


def _renamed(name: str, before: int, after: int) -> str:
    parts = name.split(".")
    if str(before) in parts:
        parts[parts.index(str(before))] = str(after)
    return ".".join(parts)
