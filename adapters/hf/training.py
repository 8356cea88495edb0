"""Runs an unmodified transformers model as teacher or gated student.

Public extension points only: a registered attention function and forward hooks where keys before
RoPE come from. What it serves, and where that is, `models` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from ...errors import UnsupportedError
from .models import AttentionLayer, Served, check_pre_rope, served, shards
from .rule.pre_rope import keep_for, key_before_rope
from .rule.probe_attention import SINKS
from .rule.untouched import all_named
from .sharded import through_root
from .training_attention import dense_attention, sliding_attention
from .wrappers import base_of, decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "kvpolicy_training"  # unregistered as a mask function: batches carry no padding
_SLOT = "_kvpolicy_training"


class Attended(NamedTuple):
    """One attention call of a forward.

    `layer` is whose keys it reads, of those with keys, and `call` its number in the forward: a
    layer that reads another's keys has a number of its own. `query` is `[B, H, N, D]`; `key`,
    `value` and `key_pre`, before RoPE, are `[B, Hkv, N, D]`; `sinks` `[H]` or None.
    """

    layer: int
    call: int
    query: Tensor
    key: Tensor
    value: Tensor
    key_pre: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None

    def dense(self) -> Tensor:
        """What the model itself computes, `[B, H, N, Dv]`."""
        return dense_attention(
            self.query, self.key, self.value, self.scale, self.softcap, self.sinks
        )


class AttentionRule(Protocol):
    """What attention computes while a model is attached: `[B, H, N, Dv]`."""

    def __call__(self, attended: Attended, /) -> Tensor: ...


class _Keys:
    """A layer with keys: what is made of them before its attention call."""

    def __init__(self, index: int, layer: AttentionLayer) -> None:
        self.index, self.window, self.chunk = index, layer.window, layer.chunk
        self.pre_rope = layer.pre_rope
        self.pre: Tensor | None = None  # before RoPE, for layers that read them later


class _Calls:
    """The attention calls of one module in a forward: which layer's keys each of them reads."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, _Keys, bool]] = []  # number, keys, whether they are its own
        self.done = 0
        self.rule: AttentionRule | None = None
        self.kept: Any = None  # what its keys before RoPE are made from

    def keep(self, output: Any) -> None:
        self.kept = output

    def next(self) -> tuple[int, _Keys, bool]:
        self.done += 1
        return self.calls[(self.done - 1) % len(self.calls)]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    calls: _Calls = getattr(module, _SLOT)
    number, keys, own = calls.next()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    sinks = next((given[name] for name in SINKS if given.get(name) is not None), None)
    softcap = given.get("softcap")
    if keys.window is not None:  # nothing far to gate: rules do not apply
        out = sliding_attention(
            query, key, value, scale, window=keys.window, chunk=keys.chunk, softcap=softcap,
            sinks=sinks,
        )  # fmt: skip
    elif calls.rule is None:
        out = dense_attention(query, key, value, scale, softcap, sinks)
    else:
        if own:
            kept, calls.kept = calls.kept, None
            assert keys.pre_rope is not None
            keys.pre = key_before_rope(keys.pre_rope, key, kept)
        assert keys.pre is not None
        attended = Attended(
            keys.index, number, query, key, value, keys.pre, scale, softcap, sinks
        )  # fmt: skip
        out = calls.rule(attended)
    return out.transpose(1, 2).contiguous(), None


class AttachedModel:
    """A frozen model whose attention can be given a rule for one forward."""

    def __init__(
        self, decoder: nn.Module, calls: list[_Calls], root: nn.Module | None = None
    ) -> None:
        self._decoder, self._calls = decoder, calls
        self._root = root  # whose hooks gather the weights of a model that ranks hold in parts

    def hidden(self, input_ids: Tensor, rule: AttentionRule | None = None) -> Tensor:
        """Final normed hidden states `[B, N, hidden]`; without a rule, those of the teacher.

        A backward pass with activation checkpointing recomputes layers, so the rule of the last
        forward stays until the next one.
        """
        for calls in self._calls:
            calls.rule, calls.kept, calls.done = rule, None, 0
        device = input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if self._root is not None:
                return through_root(self._root, self._decoder, input_ids)
            states: Tensor = self._decoder(input_ids, use_cache=False).last_hidden_state
            return states


@contextmanager
def attach_for_training(
    model: PreTrainedModel, *, checkpointing: bool = True
) -> Iterator[AttachedModel]:
    """Freeze a model, install the training attention and undo everything on exit.

    Args:
        model: a causal language model that the adapter serves.
        checkpointing: recompute each layer's activations in the backward pass.

    Raises:
        UnsupportedError: the adapter does not serve the model, or ranks share its heads.
    """
    known = served(model)
    check_pre_rope(known)
    check_whole_heads(known)
    base, decoder = base_of(model), decoder_of(model)
    AttentionInterface.register(NAME, _attention)
    was_training = model.training
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    calls = _calls(base, known)
    with ExitStack() as undo:
        undo.callback(model.train, was_training)
        for parameter, flag in frozen:
            undo.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for module, own in calls.items():
            rule = next((keys.pre_rope for _, keys, mine in own.calls if mine), None)
            if rule is not None:
                for hook in keep_for(base, rule, module, own.keep):
                    undo.callback(hook.remove)
            setattr(module, _SLOT, own)
            undo.callback(delattr, module, _SLOT)
        if checkpointing:
            for layer in _decoder_layers(decoder, calls):
                _checkpoint(layer, [calls[x] for x in layer.modules() if x in calls])
                undo.callback(delattr, layer, "forward")
        model.eval()
        undo.enter_context(all_named(base, NAME))
        yield AttachedModel(decoder, list(calls.values()), base if known.sharded else None)


def check_whole_heads(known: Served) -> None:
    """Raises UnsupportedError for tensor parallelism, where a rank would train its own heads."""
    if not known.sharded and shards(known.layers[0].module)[1] > 1:
        raise UnsupportedError(
            "model: training wants every head on each rank, tensor parallelism splits them; load "
            "it whole, or split its weights by fully_shard"
        )


def _calls(base: Any, known: Served) -> dict[Any, _Calls]:
    """By attention module: its calls in a forward."""
    keys = [_Keys(index, layer) for index, layer in enumerate(known.layers)]
    found: dict[Any, _Calls] = {}
    for number, layer in enumerate(known.probe.layers):
        own = found.setdefault(base.get_submodule(layer.module), _Calls())
        own.calls.append((number, keys[known.places[layer.reads]], not layer.shared))
    return found


def _decoder_layers(decoder: nn.Module, calls: dict[Any, _Calls]) -> list[nn.Module]:
    """The elements of lists of modules around attention."""
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    around = [x for each in lists for x in each if any(y in calls for y in x.modules())]
    inner = {id(y) for x in around for y in x.modules() if y is not x}
    return list({id(x): x for x in around if id(x) not in inner}.values())


def _checkpoint(layer: nn.Module, calls: list[_Calls]) -> None:
    # transformers' own switch needs training mode and changed its name; this is all it does.
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        done = [each.done for each in calls]

        def again(*args: Any, **kwargs: Any) -> Any:
            for each, count in zip(calls, done, strict=True):
                each.done = count
            return forward(*args, **kwargs)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    layer.forward = run
