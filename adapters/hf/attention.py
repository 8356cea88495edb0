"""Our attention function: from transformers' layout to the pipeline's and back."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...errors import UnsupportedError
from .arguments import check_attention
from .changes import Changes
from .compile import PLACE, attend
from .config_names import outside
from .faces import NAME, KVRef, ValueRef
from .models import AttentionLayer, Rules
from .rule.pre_rope import given_arguments, key_before_rope
from .rule.records import PreRope

PRE = "_kvpolicy_pre_rope"  # left by a hook: what keys before RoPE are made from
QUERY = "_kvpolicy_pre_query"  # the same of queries
HIDDEN = "_kvpolicy_hidden"  # left on the attention module


def keep_pre(layer: AttentionLayer, changes: Changes) -> None:
    """Lets the attention of a layer find its keys before RoPE."""
    _keep(layer.module, layer.source, layer.pre_rope, PRE, changes)


def keep_query(layer: AttentionLayer, changes: Changes) -> None:
    """Lets the attention of a layer find its queries before RoPE."""
    _keep(layer.module, layer.query_source, layer.pre_query, QUERY, changes)


def _keep(
    module: Any, source: nn.Module | None, rule: PreRope | None, name: str, changes: Changes
) -> None:
    assert rule is not None
    changes.later(functools.partial(_forget, (module, source), name))
    if source is not None:
        changes.hook(source, _keep_output if name == PRE else _keep_query_output)
    elif rule.form == "rotate_back" and rule.rotation is not None:
        keep = functools.partial(_keep_argument, rule.rotation.keyword, name)
        changes.hook(module, keep, pre=True, with_kwargs=True)


# Functions of the module, which dynamo traces without guarding on closures.
def _keep_output(module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__[PRE] = output


def _keep_query_output(module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__[QUERY] = output


def _keep_argument(
    argument: str, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    module.__dict__[name] = given_arguments(module, args, kwargs)[argument]


def keep_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module."""
    module.__dict__[HIDDEN] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def forget_hidden(module: nn.Module) -> None:
    """Drops what a hook left for an attention call that never came."""
    _forget((module,), HIDDEN)


def _forget(modules: Iterable[nn.Module | None], name: str) -> None:
    for module in modules:
        if module is not None:
            module.__dict__.pop(name, None)


def _take(module: nn.Module, name: str) -> Any:
    """What a hook left, written so that dynamo traces it."""
    if not torch.compiler.is_compiling():
        return module.__dict__.pop(name, None)
    found = getattr(module, name, None)
    if found is not None:
        delattr(module, name)
    return found


def _key_pre(rules: Rules, module: Any, key: Tensor) -> Tensor | None:
    """Keys before RoPE `[B, Hkv, S, D]`, where hooks left what they are made from."""
    return _before_rope(rules.pre_rope, rules.source, rules.source_inside, PRE, module, key)


def _query_pre(rules: Rules, module: Any, query: Tensor) -> Tensor | None:
    """Queries before RoPE `[B, Hq, S, D]`, where hooks left what they are made from."""
    return _before_rope(
        rules.pre_query, rules.query_source, rules.query_inside, QUERY, module, query
    )


def _before_rope(
    rule: PreRope | None, source: nn.Module | None, inside: bool, name: str, module: Any, x: Tensor
) -> Tensor | None:
    if rule is None:
        return None
    if rule.form == "same":
        return x
    holder = module if source is None else source
    # One outside the layer serves others as well.
    kept = _take(holder, name) if inside else getattr(holder, name, None)
    return None if kept is None else key_before_rope(rule, x, _beside(x, kept))


def _beside(x: Tensor, kept: Any) -> Any:
    """Tensors of a module that serves layers on other devices too, on that of `x`."""
    if isinstance(kept, Tensor):
        return kept.to(x.device)
    if isinstance(kept, tuple):
        return tuple(_beside(x, each) for each in kept)
    return kept


def attention(
    module: Any,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: `query` `[B, Hq, S, D]`, output `[B, S, Hq, Dv]`.

    A module outside the decoder that reads its config, as one that makes tokens of an image may,
    gets the attention that it would have without us.
    """
    if not isinstance(key, KVRef) and (other := outside(module)) is not None:
        return other(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    hidden = _take(module, HIDDEN)
    if attention_mask is not None:
        raise UnsupportedError(
            "attention_mask: a mask reached the attention past the one that its decoder's forward "
            "was given; pass a 2D mask of real tokens to the model"
        )
    if not isinstance(key, KVRef):
        raise UnsupportedError(
            "attention without a pipeline cache: this model's config says attention 'kvpolicy' but "
            "nothing is attached to it, or its hooks did not run: call the attached model or its "
            "decoder itself, not .forward of it nor its layers. If it shares its config object "
            "with an attached model, build it from a copy of that config"
        )
    if not isinstance(value, ValueRef) or value.keys is not key:
        raise UnsupportedError(
            "value: a layer attends to other values than it caches with its keys; detach, and "
            "attach to the model as it is now, which attach checks"
        )
    sinks = kwargs.get("s_aux") if kwargs.get("sinks") is None else kwargs["sinks"]
    if torch.compiler.is_compiling() and hasattr(module, PLACE):
        place, rules = getattr(module, PLACE)
        check_attention(rules, scaling, dropout, kwargs)
        pre = _key_pre(rules, module, key.key)
        before = _query_pre(rules, module, query)
        return attend(place, query, key.key, key.value, pre, before, hidden, sinks), None
    out = _attend(module, key, query, hidden, sinks, scaling, dropout, kwargs)
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(out, query)  # type: ignore[no-untyped-call]
    return out, None


# Not traced where the whole model is compiled: a cache is no part of a graph.
@torch.compiler.disable
def _attend(
    module: Any,
    handle: KVRef,
    query: Tensor,
    hidden: Tensor | None,
    sinks: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> Tensor:
    known = handle.cache.served
    if handle.place is None:
        handle.place = known.place_of(module)
    rules = known.rules[handle.layer]
    check_attention(rules, scaling, dropout, kwargs)
    pre = None if handle.wrote else _key_pre(rules, module, handle.key)
    before = None if handle.wrote else _query_pre(rules, module, query)
    return handle.cache.attend(handle, query, pre, before, hidden, sinks)


class _NoGradient(torch.autograd.Function):
    """Makes a backward pass through a cache raise where it would silently miss the attention."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "backward: an attached model serves inference only; detach it to compute gradients"
        )


AttentionInterface.register(NAME, attention)
