"""Checks of what callers hand to a pipeline; none of them waits for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from .._arguments import check_kind, check_rows, check_text, optional, wrong
from ..choices import Phase
from ..errors import CapacityError, PhaseError, UnsupportedError
from ..ops import POSITION_MASK
from ..selection import PerPhase, Selection
from ..store.layer import LayerStore
from ..store.state import CacheState, Call

PHASES: tuple[Phase, ...] = get_args(Phase)


def check_call(state: CacheState, lengths: Sequence[int], phase: str, valid: Tensor | None) -> None:
    """Raises for a call that cannot be opened."""
    wanted = f"one of {', '.join(PHASES)}"
    check_text("phase", phase, wanted)
    if phase not in PHASES:
        raise ValueError(f"phase: wanted {wanted}, got {phase!r}")
    if state.call is not None:
        raise PhaseError("begin: a call is in flight already; commit or abort it first")
    wanted = f"{state.batch} numbers from 0"
    listed = isinstance(lengths, Sequence) and not isinstance(lengths, str | bytes)
    if not listed:
        check_kind("lengths", lengths, (list, tuple), wanted)
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in lengths)
    if not whole or len(lengths) != state.batch or any(n < 0 for n in lengths):
        raise ValueError(f"lengths: wanted {wanted}, got {list(lengths)}")
    longest = max(a + b for a, b in zip(state.lengths, lengths, strict=True))
    if longest > POSITION_MASK + 1:
        raise CapacityError(
            f"lengths: a sequence holds at most {POSITION_MASK + 1} tokens, got {longest}"
        )
    if phase == "decode" and state.pending_end:
        raise PhaseError(
            "decode: the prompt has not ended; call end_prompt(state) first so that its eviction "
            "can act"
        )
    if phase == "prompt" and state.looks_back is None:  # a replay is a prompt of its own
        _check_whole(state, lengths)
    if valid is not None:
        _check_valid(state, lengths, phase, valid)
    elif phase == "decode" and any(
        n != 1 for n, on in zip(lengths, state.active, strict=True) if on
    ):
        raise ValueError(f"valid: wanted for a decode call that adds {list(lengths)}, got None")


def _check_whole(state: CacheState, lengths: Sequence[int]) -> None:
    """Raises UnsupportedError for another part of a prompt that a selection decides as a whole."""
    deciding = [x.selection for x in state.managed if x.selection.whole_prompt]
    later = next((a for a, b in zip(state.lengths, lengths, strict=True) if a and b), None)
    if deciding and later is not None:
        raise UnsupportedError(
            f"{whole_name(deciding[0])}: a prompt's last queries decide what all of it reads, so "
            f"it comes in one call, without chunks and turns; got more after {later} tokens"
        )


def whole_name(selection: Selection) -> str:
    """What decides whole prompts in a selection that does."""
    policy = selection.prefill if isinstance(selection, PerPhase) else selection
    return type(policy).__name__


def _check_valid(state: CacheState, lengths: Sequence[int], phase: str, valid: Tensor) -> None:
    check_kind("valid", valid, Tensor, f"bools [{state.batch}, T]")
    if phase == "prompt":
        raise ValueError(wrong("valid", "None for prompt calls, which are packed", valid))
    if valid.dtype != torch.bool or valid.ndim != 2 or valid.shape[0] != state.batch:
        raise ValueError(
            f"valid: wanted bools [{state.batch}, T], got {valid.dtype} {list(valid.shape)}"
        )
    if not valid.shape[1]:
        raise ValueError(f"valid: wanted at least one column, got {list(valid.shape)}")
    if valid.device.type == "cpu" and valid.sum(1).tolist() != list(lengths):
        raise ValueError(
            f"lengths: wanted the real tokens that valid names, {valid.sum(1).tolist()}, got "
            f"{list(lengths)}"
        )


def check_layer(state: CacheState, layer: int) -> Call:
    """The open call; raises if `layer` cannot run in it now."""
    if state.call is None:
        raise PhaseError("attend: no call is open; call begin(state, lengths, phase) first")
    if not isinstance(layer, int):
        check_kind("layer", layer, int, f"one of {state.spec.layers} from 0")
    if not 0 <= layer < len(state.layers):
        raise ValueError(f"layer: wanted one of {state.spec.layers} from 0, got {layer}")
    if layer in state.call.done:
        raise PhaseError(f"attend: layer {layer} ran in this call already; commit or abort it")
    return state.call


def check_shared(state: CacheState, layer: int, last: Sequence[int] | None) -> Call:
    """The open call; raises unless `layer` ran in it and lets others read its keys."""
    if state.call is None:
        raise PhaseError("attend_shared: no call is open; call begin(state, lengths, phase) first")
    each = state.spec.each
    check_kind("layer", layer, int, "one that the spec says is shared")
    if not 0 <= layer < len(each) or not each[layer].shared:
        shares = [n for n, sizes in enumerate(each) if sizes.shared]
        raise ValueError(f"layer: wanted one that the spec says is shared, {shares}, got {layer}")
    if layer not in state.call.done:
        raise PhaseError(f"attend_shared: layer {layer} has not run in this call")
    call = state.call
    if last is not None:
        most = list(call.added)
        optional(check_rows, "last", last, f"up to {most} tokens")
        fits = len(last) == len(most) and all(0 <= n <= m for n, m in zip(last, most, strict=True))
        if call.phase != "prompt" or not fits:
            raise ValueError(f"last: wanted up to {most} tokens of a prompt call, got {last}")
    return call


def check_complete(state: CacheState) -> Call:
    """The open call; raises if some layer has not run in it."""
    if state.call is None:
        raise PhaseError("commit: no call is open; call begin(state, lengths, phase) first")
    missing = [layer for layer in range(state.spec.layers) if layer not in state.call.done]
    if missing:
        raise PhaseError(f"commit: layers {missing} have not run; attend to them or abort the call")
    return state.call


def check_asked(
    layer: LayerStore, tokens: tuple[int, ...], query_pre: Tensor | None, hidden: Tensor | None
) -> None:
    """Raises unless a call brings, and was told, what the layer's eviction asks for.

    `tokens` are the sizes of its token axes.
    """
    name = type(layer.eviction).__name__
    if layer.query_ring is not None:
        if query_pre is None:
            raise ValueError(f"query_pre: wanted queries before RoPE, which {name} reads, got None")
        wanted = (*tokens[:-1], layer.sizes.heads, tokens[-1], layer.sizes.head_dim)
        check_input(layer, "query_pre", query_pre, wanted)
    if layer.hidden is not None:
        if hidden is None:
            raise ValueError(f"hidden: wanted attention inputs, which {name} reads, got None")
        wanted = (*tokens, layer.hidden.shape[3])
        if tuple(hidden.shape) != wanted:
            raise ValueError(f"hidden: wanted {list(wanted)}, got {list(hidden.shape)}")
    if not layer.slides:
        check_told(layer)


def check_told(layer: LayerStore) -> None:
    """Raises PhaseError unless the cache was told what the layer's eviction asks of the model."""
    policy, name = layer.eviction, type(layer.eviction).__name__
    if policy.output_weight and layer.output_weight is None:
        raise PhaseError(
            f"output_weight: {name} reads the output projection of layer {layer.index}; say it by "
            "pipeline.tell(state, layer, output_weight=...) first"
        )
    if policy.rope and not layer.told_rope:
        raise PhaseError(
            f"rope: {name} reads how layer {layer.index} turns queries and keys; say it by "
            "pipeline.tell(state, layer, rope=...) first, None where it does not"
        )


def check_input(layer: LayerStore, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless `tensor` has the wanted shape and the layer's dtype and device."""
    like = layer.ring.k
    if (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.dtype == like.dtype
        and tensor.device == like.device
    ):
        return
    check_kind(name, tensor, Tensor, f"a tensor {list(shape)}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: wanted {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: wanted {like.dtype}, got {tensor.dtype}")
    raise ValueError(f"{name}: wanted a tensor on {like.device}, got {tensor.device}")
