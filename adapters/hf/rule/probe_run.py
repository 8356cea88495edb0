"""A run of a model by our attention through handles, beside its own."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from .find_pre_rope import find
from .find_query import find_query
from .handle import Handle, ProbeCache, StoredLayer
from .kinds import LayerKind
from .own_run import OwnCall
from .probe_attention import (
    SINKS,
    Scores,
    allowed,
    attend,
    rounding,
    scores_of,
    unknown_argument,
)
from .probe_masks import difference, positions
from .records import ModelRefused, PreRope, ProbedLayer
from .runs import OURS, forwards
from .watched import Watched, watch


class ProbeRun:
    """Our attention through handles, call by call beside the model's own.

    With `follow` the model goes on from each call with its own attention's result.
    """

    def __init__(
        self, model: Any, kinds: tuple[LayerKind, ...], own: list[OwnCall], *, follow: bool
    ) -> None:
        self.model, self.kinds, self.own, self.follow = model, kinds, own, follow
        self.names = {id(module): name for name, module in model.named_modules()}
        self.cache = ProbeCache(kinds, self.updated)
        self.layers: list[ProbedLayer] = []
        self.calls = self.past = 0
        self.worst = 0.0  # of what is allowed
        self.watched: dict[int, Watched] = {}

    def run(self, tokens: Tensor) -> list[Tensor]:
        """Logits of the prompt and of each step."""
        modules = {id(call.module): call.module for call in self.own}
        try:
            for number, module in modules.items():
                self.watched[number] = watch(self.names[number], module)
            logits = forwards(self, OURS, tokens, self.cache)
        finally:
            for seen in self.watched.values():
                for hook in seen.hooks:
                    hook.remove()
        self.check_updates()
        if self.calls != len(self.own):
            raise ModelRefused(
                f"its own attention is called {len(self.own)} times, ours {self.calls} times",
                check="attention",
            )
        return logits

    def begin(self, past: int) -> None:
        if self.calls:
            self.check_updates()
        self.past = past
        self.cache.begin()

    def updated(self, layer: StoredLayer) -> None:
        if layer.updates > 1:
            raise ModelRefused(
                f"it caches keys {layer.updates} times in one forward, wanted once",
                check="updates",
                layer=layer.index,
            )

    def check_updates(self) -> None:
        """Raises ModelRefused for a layer that kept no keys in the last forward, or read none."""
        for layer in self.cache.stored:
            if layer.updates != 1 or not layer.reads:
                what = "read" if layer.updates else "cached"
                raise ModelRefused(
                    f"a forward {what} no keys of a layer that keeps some by the config",
                    check="updates",
                    layer=layer.index,
                )

    def mask(self, **arguments: Any) -> None:
        """None, as for an attached model."""

    def attention(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: Any = None,
        dropout: Any = 0.0,
        is_causal: Any = None,
        **given: Any,
    ) -> Any:
        name = type(module).__name__
        if not isinstance(key, Handle) or not isinstance(value, Handle):
            raise ModelRefused(
                "its attention reads keys that did not come from the cache",
                check="handle",
                layer=getattr(module, "layer_idx", None),
                module=name,
            )
        stored: StoredLayer = key.layer
        layer = self._layer(module, stored)

        def refuse(check: Any, reason: str) -> ModelRefused:
            return ModelRefused(reason, check=check, layer=layer, module=name)

        unknown = unknown_argument(dropout, is_causal, given)
        if unknown:
            raise refuse("arguments", f"its attention is called with {unknown}")
        scores = scores_of(query, scaling, given)
        if isinstance(scores, str):
            raise refuse("arguments", scores)
        own = self.own[self.calls] if self.calls < len(self.own) else None
        if own is None or own.module is not module or own.past != self.past:
            raise refuse("attention", "its attention calls are others than with its own cache")
        self.calls += 1
        stored.reads += 1
        assert stored.stored is not None and stored.values_stored is not None
        assert stored.fresh is not None
        # Layers that share keys may run on several devices.
        k, v = (x.to(query.device) for x in (stored.stored, stored.values_stored))
        if query.shape[-1] != k.shape[-1] or query.shape[1] % k.shape[1]:
            raise refuse(
                "attention",
                f"{query.shape[1]} query heads of {query.shape[-1]} channels read {k.shape[1]} KV "
                f"heads of {k.shape[-1]}",
            )
        kind = self.kinds[stored.index]
        self._check_mask(refuse, own, kind, query.device)
        self._check_output(refuse, own, kind, scores)
        if self.follow or query.dtype.itemsize < 4:
            self._check_inputs(refuse, own, query, k, v)
        if not self.past:
            self.layers.append(self._record(module, layer, stored, query, scores, given))
        out = own.output
        if not self.follow and query.dtype.itemsize >= 4:
            out = attend(query, k, v, scores, kind, self.past).to(query.dtype).contiguous()
        if not self.past:
            ended = functools.partial(self._projected, len(self.layers) - 1)
            self.watched[id(module)].look_for_output(out, ended)
        return out, None

    def _projected(self, call: int, name: str, reason: str) -> None:
        self.layers[call] = attrs.evolve(self.layers[call], output=name, no_output=reason)

    def _layer(self, module: Any, stored: StoredLayer) -> int:
        if not stored.reads:
            return stored.index
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index == stored.index:
            raise ModelRefused(
                "its keys are read twice in one forward",
                check="updates",
                layer=stored.index,
                module=type(module).__name__,
            )
        return index

    def _check_mask(self, refuse: Any, own: OwnCall, kind: LayerKind, device: torch.device) -> None:
        if own.mask is None:
            return
        length = own.past + own.query.shape[2]
        found = difference(own.mask, kind, positions(self.kinds).to(device), length)
        if found is not None:
            query, key, sees = found
            raise refuse(
                "mask",
                f"by its mask, a query at position {query} {'sees' if sees else 'does not see'} "
                f"the key at {key}, by its kind {kind.kind!r} it does{' not' if sees else ''}",
            )

    def _check_inputs(
        self, refuse: Any, own: OwnCall, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Refuses a layer that attends to others without a mask, which results would not show."""
        columns = query.shape[2]
        for name, theirs, ours in (
            ("queries", own.query, query),
            ("keys", own.key, key),
            ("values", own.value, value),
        ):
            a, b = (x[:, :, -columns:].double() for x in (theirs, ours))
            if float((a - b).abs().max()) > 16 * rounding(query.dtype) * float(a.abs().max()):
                raise refuse("attention", f"its {name} are others without a mask")

    def _check_output(self, refuse: Any, own: OwnCall, kind: LayerKind, scores: Scores) -> None:
        if own.key.shape[-1] != own.query.shape[-1] or own.query.shape[1] % own.key.shape[1]:
            raise refuse("attention", "its own attention changes the heads or channels of its keys")
        ours = attend(own.query, own.key, own.value, scores, kind, own.past)
        if own.exact.shape != ours.shape:
            raise refuse(
                "attention",
                f"its own attention gives shape {tuple(own.exact.shape)}, wanted "
                f"{tuple(ours.shape)}",
            )
        far = float((ours - own.exact.double()).abs().max())
        bound = allowed(own.query, own.key, own.value, scores, own.exact.dtype)
        if not far <= bound:
            raise refuse(
                "attention",
                f"its own attention is {far:.2g} from softmax attention, rounding allows "
                f"{bound:.2g}",
            )
        self.worst = max(self.worst, far / bound)

    def _record(
        self,
        module: Any,
        layer: int,
        stored: StoredLayer,
        query: Tensor,
        scores: Scores,
        given: dict[str, Any],
    ) -> ProbedLayer:
        kind, key, value = self.kinds[stored.index], stored.fresh, stored.values_stored
        assert key is not None and value is not None
        pre: PreRope | str = f"it reads the keys of layer {stored.index}"
        if layer == stored.index:
            pre = find(self.watched[id(module)], query, key, clips=_clips(module))
        pre_query = find_query(self.watched[id(module)], query, pre, clips=_clips(module))
        taken = next(iter(self.watched[id(module)].arguments.values()), None)
        sinks = next((word for word in SINKS if given.get(word) is not None), "")
        return ProbedLayer(
            module=self.names[id(module)],
            layer=layer,
            reads=stored.index,
            kind=self.kinds[layer].kind if layer < len(self.kinds) else "shared",
            window=kind.window,
            chunk=kind.chunk,
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=key.shape[-1],
            value_dim=value.shape[-1],
            scale=scores.scale,
            softcap=scores.softcap,
            sinks=_attribute(module, scores.sinks) if sinks else "",
            sinks_keyword=sinks,
            pre_rope=None if isinstance(pre, str) else pre,
            no_pre_rope=pre if isinstance(pre, str) else "",
            pre_query=None if isinstance(pre_query, str) else pre_query,
            no_pre_query=pre_query if isinstance(pre_query, str) else "",
            hidden=taken.shape[-1] if isinstance(taken, Tensor) else 0,
            dtype=key.dtype,
            device=key.device,
        )


def _attribute(module: nn.Module, tensor: Tensor | None) -> str:
    """The parameter or buffer of `module` that is `tensor`, by name; "" if there is none."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return next((name for name, held in named if held is tensor), "")


def _clips(module: Any) -> bool:
    """Whether a module bounds its queries, keys and values."""
    config = getattr(module, "config", None)
    holders = (module, config, getattr(config, "attn_config", None))
    return any(getattr(holder, "clip_qkv", None) is not None for holder in holders)
