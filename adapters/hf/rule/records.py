"""What a probe finds out about a model, and how it refuses one."""

from __future__ import annotations

from typing import Any, Literal

import attrs
import torch

from ....errors import UnsupportedError
from .kinds import Kind, LayerKind

Check = Literal["kinds", "forward", "handle", "updates", "arguments", "mask", "attention", "logits"]
Way = Literal["in place", "cut"]


class ModelRefused(UnsupportedError):
    """A model that a probe refused.

    Attributes:
        check: which check it failed.
        layer: the cache layer, None where the check is not about one.
        module: class name of the attention module, "" where none was reached.
        place: "file.py:line" of the model's code, "" where there is none.
    """

    def __init__(
        self,
        reason: str,
        *,
        check: Check,
        layer: int | None = None,
        module: str = "",
        place: str = "",
    ) -> None:
        where = "" if layer is None else f" at layer {layer}"
        where += f" in {module}" if module else ""
        where += f" ({place})" if place else ""
        super().__init__(f"model: check {check!r} failed{where}: {reason}")
        self.reason, self.check, self.layer = reason, check, layer
        self.module, self.place = module, place


@attrs.frozen(kw_only=True)
class Rotation:
    """How a layer applies RoPE, and where the model's cos and sin come from.

    Attributes:
        keyword: argument of the attention module's forward that holds `(cos, sin)`; "" where a
            submodule makes them.
        module: qualified name of that submodule, whose output they are; "" for a keyword.
        channels: of a head that are rotated.
        interleaved: whether channels `(2i, 2i+1)` are a pair, else `(i, i + channels / 2)`.
        repeated: whether cos and sin as wide as `channels` hold `a a b b`, else `a b a b`.
        sign: -1 where the model rotates the other way.
        tail: whether the last channels of a head are rotated, else the first.
        turns: radians by which each pair of channels turns from one position to the next, as a
            short forward showed them; empty where it did not.
        factor: by which cos and sin are multiplied.
    """

    keyword: str = ""
    module: str = ""
    channels: int
    interleaved: bool = False
    repeated: bool = False
    sign: int = 1
    tail: bool = False
    turns: tuple[float, ...] = ()
    factor: float = 1.0


@attrs.frozen(kw_only=True)
class PreRope:
    """How the keys of a layer before RoPE are had at call time; see `pre_rope.key_before_rope`.

    Attributes:
        form: "module": from a submodule's output, which is exact: rotating it gave the key that was
            cached. "rotate_back": the cached key rotated back by the model's own cos and sin.
            "same": the layer has no RoPE, the key is the one that was cached.
        module: qualified name of the submodule, for "module".
        element: of its output where that is a tuple; None where it is a tensor.
        offset: channel of its output where head 0 begins.
        stride: channels from one head to the next.
        heads_first: whether the output is `[B, Hkv, S, D]`; else its channels are the last axis of
            `[B, S, ...]`.
        rotation: the layer's RoPE; None for "same".
    """

    form: Literal["module", "rotate_back", "same"]
    module: str = ""
    element: int | None = None
    offset: int = 0
    stride: int = 0
    heads_first: bool = False
    rotation: Rotation | None = None


@attrs.frozen(kw_only=True)
class ProbedLayer:
    """One attention call of a forward: a layer that reads keys and values.

    Sizes are those of this rank's heads. A module that serves several layers has a record for each.

    Attributes:
        module: qualified name of the attention module in the model (`base_of` of what was probed).
        layer: index of the decoder layer in a cache.
        reads: cache layer whose keys and values it reads: itself, or another's.
        kind: of the layer; see LayerKind.
        window: keys that a query sees, itself included; None where it sees all.
        chunk: size of chunks across which no query sees; None where there are none.
        heads: query heads.
        kv_heads: KV heads.
        head_dim: channels of a key.
        value_dim: channels of a value.
        scale: factor of q.k.
        softcap: c of `c * tanh(scale * q.k / c)`; None without.
        sinks: attribute of the module that holds a logit for each query head, `[Hq]`, which joins
            the softmax; "" without. Read it when the layer runs, as weights may move.
        sinks_keyword: the argument of the attention function by which it comes; "" without.
        pre_rope: how to get the keys before RoPE; None where no way was found.
        no_pre_rope: why not; "" where `pre_rope` is given.
        pre_query: how to get the queries before RoPE, which do as keys do; None without a way.
        no_pre_query: why not.
        output: qualified name of the submodule that projects what attention gives.
        no_output: why there is none; "" where `output` is given.
        hidden: channels of the attention module's input; 0 where they were not seen.
        dtype: of its keys and values.
        device: where it ran.
    """

    module: str
    layer: int
    reads: int
    kind: Kind
    window: int | None
    chunk: int | None
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float | None = None
    sinks: str = ""
    sinks_keyword: str = ""
    pre_rope: PreRope | None = None
    no_pre_rope: str = ""
    pre_query: PreRope | None = None
    no_pre_query: str = ""
    output: str = ""
    no_output: str = "its attention module has not run to its end"
    hidden: int = 0
    dtype: torch.dtype
    device: torch.device

    @property
    def shared(self) -> bool:
        """Whether it reads another layer's keys."""
        return self.reads != self.layer


@attrs.frozen(kw_only=True)
class Probe:
    """What a probe found out about a served model.

    Attributes:
        layers: of each attention call of a forward, in the order of the calls.
        kinds: of each decoder layer, by its index in a cache.
        way: "in place" on the model itself, or on a random model of its config, "cut" to one layer
            of each kind and narrow.
        reason: why it was cut; "" in place.
        difference: largest difference to the model's own attention, as a part of what is allowed.
        decoded: whether a decode step was compared too.
        cached: whether an earlier probe of the same configuration vouches for this one.
        hides: whether hidden columns leave no trace in positions or in states of transformers' own.
        goes_on: whether a forward of several columns goes on from such states.
        first: position that a forward without position ids gives to a first token; None where it
            counts by no rule that is known.
        skips: an id that such a forward does not count, and puts before `first`, if there is one.
        apart: axes of position ids whose restart is a new text: 2 of `[B, S]`, 3 of `[4, B, S]`.
        counts: where an attention module counts the columns of its cache by itself, as
            "file.py:line"; "" where none does, or it shows in nothing.
        counts_from: from how many columns on that shows.
        counting: the cache layers of these modules.
    """

    layers: tuple[ProbedLayer, ...]
    kinds: tuple[LayerKind, ...]
    way: Way = "in place"
    reason: str = ""
    difference: float
    decoded: bool
    cached: bool = False
    hides: bool = True
    goes_on: bool = True
    first: int | None = 0
    skips: int | None = None
    apart: frozenset[int] = frozenset()
    counts: str = ""
    counts_from: int = 0
    counting: tuple[int, ...] = ()

    @property
    def own(self) -> tuple[int, ...]:
        """Cache layers that hold a state of transformers' own; hybrid ones also hold keys."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind.own)

    @property
    def stored(self) -> tuple[ProbedLayer, ...]:
        """The layers that store keys and values, by cache layer: one record each."""
        return tuple(sorted((x for x in self.layers if not x.shared), key=lambda x: x.layer))

    def modules(self, model: Any) -> list[Any]:
        """The attention modules of `model`, one for each of `layers`."""
        return [model.get_submodule(layer.module) for layer in self.layers]
