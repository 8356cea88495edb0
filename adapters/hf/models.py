"""What is known of a transformers model: where its decoder is, and what its attention computes on.

Attaching, training and evaluation read models through this module alone. No family is named: a
model is served because `probe` found what the cache needs to know of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs
import torch
from torch import nn

from ...errors import UnsupportedError
from .placement import device_of, dtype_of
from .ranks import Ranks
from .rule.kinds import text_config
from .rule.probe import probe
from .rule.records import PreRope, Probe, ProbedLayer
from .wrappers import base_of, decoder_of, fully_sharded


class Rules(NamedTuple):
    """What a layer's attention does with what it is given; see AttentionLayer."""

    scale: float
    softcap: float | None
    sinks: str
    pre_rope: PreRope | None
    source: nn.Module | None
    source_inside: bool
    pre_query: PreRope | None
    query_source: nn.Module | None
    query_inside: bool


@attrs.frozen(eq=False, kw_only=True)
class AttentionLayer:
    """What the attention of one layer computes on, on this rank.

    Attributes:
        module: the attention module.
        place: of the layer in transformers' cache.
        window: keys that a query sees, of a layer that only slides; None where it sees all.
        chunk: size of chunks across which no query sees.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: channels of queries and keys.
        value_dim: channels of values.
        scale: factor of q.k.
        softcap: bound of the product.
        sinks: name of the attention function's argument that brings sinks, "" without.
        shared: whether other layers read its keys.
        source: the submodule whose output `pre_rope` starts from, None where there is none.
        pre_rope: how keys before RoPE are had, None where there is no way.
        no_pre_rope: why not.
        query_source, pre_query, no_pre_query: the same of the queries.
        output: the submodule that projects what attention gives, None where there is none.
        no_output: why not.
        hidden: channels of the module's input; 0 where they are not known.
        dtype: of its keys and values.
        device: where it runs.
    """

    module: Any
    place: int
    window: int | None
    chunk: int | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None
    sinks: str
    shared: bool
    source: nn.Module | None
    pre_rope: PreRope | None
    no_pre_rope: str
    query_source: nn.Module | None
    pre_query: PreRope | None
    no_pre_query: str
    output: nn.Module | None
    no_output: str
    hidden: int
    dtype: torch.dtype
    device: torch.device

    @property
    def rules(self) -> Rules:
        own = list(self.module.modules())
        inside, query_inside = (
            source is None or any(x is source for x in own)
            for source in (self.source, self.query_source)
        )
        return Rules(
            self.scale, self.softcap, self.sinks, self.pre_rope, self.source, inside,
            self.pre_query, self.query_source, query_inside,
        )  # fmt: skip


@attrs.frozen(eq=False, kw_only=True)
class Served:
    """A model that the rule serves.

    Attributes:
        config: of its text decoder.
        layers: those with keys of their own, in the order of transformers' cache.
        readers: attention modules that read the keys of other layers alone.
        places: the index in `layers` by the place in transformers' cache.
        probe: how it was checked.
        rules: of `layers`.
        sharded: whether ranks hold parts of each weight (`fully_shard`), all of them every head.
    """

    config: Any
    layers: tuple[AttentionLayer, ...]
    readers: tuple[Any, ...]
    places: dict[int, int]
    probe: Probe
    rules: tuple[Rules, ...]
    sharded: bool = False

    def place_of(self, module: Any) -> int:
        """The place of the one layer that `module` attends for."""
        found = [layer.place for layer in self.layers if layer.module is module]
        if len(found) != 1:
            raise UnsupportedError(
                f"torch.compile: {type(module).__name__} attends for {len(found)} layers with keys "
                "of their own; a compiled model is served where each has a module"
            )
        return found[0]

    @property
    def modules(self) -> list[Any]:
        """Every attention module, each once."""
        found = [layer.module for layer in self.layers] + list(self.readers)
        return list({id(module): module for module in found}.values())


def served(model: nn.Module, *, verify: bool = True) -> Served:
    """What is known of `model` as it is now, after a check by the rule; see `probe`.

    Raises UnsupportedError for a model that is not served.
    """
    decoder = decoder_of(model)
    if not fully_sharded(model):
        check_even(decoder)
    return _served(model, decoder, probe(model, verify=verify))


def _served(model: nn.Module, decoder: nn.Module, found: Probe) -> Served:
    config, base = text_config(decoder.config), base_of(model)
    sharded = fully_sharded(model)
    read = {layer.reads for layer in found.layers if layer.shared}
    layers = []
    for layer in found.stored:
        # A cut model has all heads; this rank may hold a part.
        module = base.get_submodule(layer.module)
        parts = shards(module)[1] if found.way == "cut" and not sharded else 1
        layers.append(_layer(base, config, layer, layer.layer in read, parts))
    if not layers:
        raise UnsupportedError("model: no layer keeps keys and values, there is nothing to cache")
    readers = [base.get_submodule(layer.module) for layer in found.layers if layer.shared]
    places = {layer.place: index for index, layer in enumerate(layers)}
    return Served(
        config=config,
        layers=tuple(layers),
        readers=tuple(readers),
        places=places,
        probe=found,
        rules=tuple(layer.rules for layer in layers),
        sharded=sharded,
    )


def check_even(decoder: nn.Module) -> None:
    """Raises UnsupportedError where ranks share a model's query heads, but not its KV heads evenly.

    Before it runs: layers of such a model fail by their shapes, on some ranks or on all.
    """
    for module in decoder.modules():
        own = {name: getattr(module, f"{name}_proj", None) for name in "qkv"}
        parts = [_ranks_of(x).parts for x in own.values() if isinstance(x, nn.Module)]
        most = max(parts, default=1)
        if most == 1:
            continue
        if min(parts) == 1:
            raise UnsupportedError(
                f"model: its {most} ranks share the query heads while each holds all KV heads; use "
                "a tensor-parallel plan that splits q_proj, k_proj and v_proj alike"
            )
        config = text_config(decoder.config)
        heads = getattr(config, "num_attention_heads", None)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        for count, what in ((kv_heads, "KV heads"), (heads, "query heads")):
            if isinstance(count, int) and count % most:
                raise UnsupportedError(
                    f"model: {most} ranks cannot share its {count} {what} evenly; run it on a "
                    "number of ranks that divides them"
                )
        return


def _layer(
    base: nn.Module, config: Any, found: ProbedLayer, shared: bool, parts: int
) -> AttentionLayer:
    module = base.get_submodule(found.module)
    name, query_name = _source(found.pre_rope), _source(found.pre_query)
    return AttentionLayer(
        module=module,
        place=found.layer,
        window=found.window if found.chunk is None else found.chunk,
        chunk=found.chunk,
        heads=found.heads // parts,
        kv_heads=found.kv_heads // parts,
        head_dim=found.head_dim,
        value_dim=found.value_dim,
        scale=found.scale,
        softcap=found.softcap,
        sinks=found.sinks_keyword,
        shared=shared,
        source=base.get_submodule(name) if name else None,
        pre_rope=found.pre_rope,
        no_pre_rope=found.no_pre_rope,
        query_source=base.get_submodule(query_name) if query_name else None,
        pre_query=found.pre_query,
        no_pre_query=found.no_pre_query,
        output=base.get_submodule(found.output) if found.output else None,
        no_output=found.no_output,
        hidden=found.hidden,
        dtype=dtype_of(module, _parent(base, found.module), config),
        device=device_of(module, _parent(base, found.module)),
    )


def _source(rule: PreRope | None) -> str:
    """The submodule whose output keys before RoPE are made from, "" where there is none."""
    if rule is None or rule.form == "same":
        return ""
    return rule.module if rule.form == "module" or rule.rotation is None else rule.rotation.module


def _parent(base: nn.Module, name: str) -> nn.Module:
    """The decoder layer around an attention module."""
    return base.get_submodule(name.rpartition(".")[0])


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The layers of `model` that keep keys and values, in order.

    Raises UnsupportedError for a model that is not served.
    """
    return list(served(model).layers)


def managed_sizes(layers: Sequence[AttentionLayer]) -> AttentionLayer:
    """The first layer that policies manage, of a model whose managed layers agree in their sizes.

    A layer that slides where all do. Raises UnsupportedError where they differ, since gates and
    patterns have one size.
    """
    managed = [layer for layer in layers if layer.window is None] or list(layers)
    sizes = sorted({(layer.kv_heads, layer.head_dim) for layer in managed})
    if len(sizes) > 1:
        said = " and ".join(f"{heads} KV heads of {dim} channels" for heads, dim in sizes)
        raise UnsupportedError(f"model: gates have one size, its layers differ: {said}")
    return managed[0]


def check_pre_rope(known: Served) -> None:
    """Raises UnsupportedError for a model whose keys before RoPE cannot be had."""
    for index, layer in enumerate(known.layers):
        if layer.pre_rope is None and layer.window is None:
            raise UnsupportedError(
                f"key_pre: the keys before RoPE, which the policy reads, cannot be had in layer "
                f"{index} ({type(layer.module).__name__}): {layer.no_pre_rope}"
            )


def check_pre_query(known: Served) -> None:
    """Raises UnsupportedError for a model whose queries before RoPE cannot be had."""
    for index, layer in enumerate(known.layers):
        if layer.pre_query is None and layer.window is None:
            raise UnsupportedError(
                f"query_pre: the queries before RoPE, which the policy reads, cannot be had in "
                f"layer {index} ({type(layer.module).__name__}): {layer.no_pre_query}"
            )


def check_here(known: Served) -> None:
    """Raises UnsupportedError where some layers' weights are nowhere and nothing brings them."""
    missing = [n for n, layer in enumerate(known.layers) if layer.device.type == "meta"]
    if missing and len(missing) < len(known.layers):
        raise UnsupportedError(
            f"model: layer {missing[0]} is on the meta device, without weights; load the model by "
            "from_pretrained, whose device_map='auto' brings offloaded weights when they are used"
        )


def attention_modules(model: nn.Module) -> list[Any]:
    """Every attention module; raises UnsupportedError for models that are not served."""
    return served(model).modules


def shards(module: Any) -> tuple[int, int]:
    """Which part of a tensor-parallel layer's heads this rank holds, and of how many."""
    ranks = _ranks_of(module)
    return (ranks.rank, ranks.mesh.size(ranks.axis)) if ranks.many else (0, 1)


def ranks_of(known: Served) -> Ranks:
    """The ranks that share the heads of a model."""
    return _ranks_of(known.layers[0].module)


_KNOWN: dict[tuple[int, int], Ranks] = {}  # by mesh, which they keep alive


def _ranks_of(module: nn.Module) -> Ranks:
    weights: list[Any] = [getattr(part, "weight", None) for part in module.modules()]
    for weight in weights:
        for axis, placement in enumerate(getattr(weight, "placements", ())):
            if placement.is_shard(0) and weight.device_mesh.size(axis) > 1:
                mesh = weight.device_mesh
                return _KNOWN.setdefault((id(mesh), axis), Ranks(mesh, axis))
    return Ranks()
