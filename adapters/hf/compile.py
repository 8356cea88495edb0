"""Compiled decoder layers: one graph for all of them, with attention as one opaque op."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PhaseError, UnsupportedError
from .attached import Attached
from .held_fast import hooks_of, others_in
from .models import Served

# On an attention module: [attachment's number, layer] on the CPU, and the layer's rules.
PLACE = "_kvpolicy_place"
Functions = tuple[Callable[..., Any], Callable[..., Any]]  # for prompts and for one column
COMPILED = "_compiled_call_impl"  # where nn.Module.compile keeps what calling a module runs
_NUMBERS = itertools.count()
# Prompt calls of fewer tokens run the layers as they are: dynamo's guards cost the host more time
# than compiled kernels save the device.
FEW = 4096
_BACKENDS = ["inductor"]  # the last one is used
# With the first, Inductor writes its own matrix-vector products for one token, several in a kernel.
# With the second it computes what they multiply beforehand: each of their programs would compute
# all of it anew, and the exponentials of an activation cost more than the weights' bytes.
_TOKEN: dict[str, Any] = {"coordinate_descent_tuning": True, "realize_opcount_threshold": 9}
# Of a decoder, by the hooks in a layer, of which sliding ones have none: dynamo does not see them.
_FUNCTIONS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Functions]] = weakref.WeakKeyDictionary()
_ATTACHMENTS: weakref.WeakValueDictionary[int, Attached] = weakref.WeakValueDictionary()


# The cache that it writes to is no argument: nothing could drop or reorder a call, since a layer's
# output depends on it. `place` is a tensor because a number would be compiled into the graph, which
# all layers share.
@torch.library.custom_op(
    "kvpolicy::attend",
    mutates_args=(),
    schema="(Tensor place, Tensor query, Tensor key, Tensor value, Tensor? pre, "
    "Tensor? query_pre, Tensor? hidden, Tensor? sinks) -> Tensor",
)
def attend(
    place: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre: Tensor | None,
    query_pre: Tensor | None,
    hidden: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention `[B, S, Hq, Dv]` of one layer through the cache of the forward in flight."""
    number, layer = place.tolist()
    attachment = _ATTACHMENTS.get(number)
    cache = None if attachment is None else attachment.cache
    if cache is None:
        raise PhaseError("attention outside a forward of the attached model's decoder")
    return cache.attend(cache.hold(layer, key, value), query, pre, query_pre, hidden, sinks)


@attend.register_fake
def _(
    place: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre: Tensor | None,
    query_pre: Tensor | None,
    hidden: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    batch, heads, columns, _ = query.shape
    return query.new_empty(batch, columns, heads, value.shape[3])


def check_compiles(decoder: Any, known: Served) -> None:
    """Raises UnsupportedError for a model whose layers cannot be compiled."""
    layers = getattr(decoder, "layers", None)
    if layers is None:
        reason = "it has no list of layers"
    elif any(hasattr(module, "_hf_hook") for module in decoder.modules()):
        reason = "accelerate moves its weights or activations between devices"
    elif any(COMPILED in layer.__dict__ for layer in layers):
        reason = "its layers are compiled already"
    elif known.readers:
        reason = "its layers hand keys on to others"
    elif len(_holders(decoder, known)) != len(known.layers):
        reason = "a layer of it attends more than once"
    else:
        return
    raise UnsupportedError(f"compile=True: {type(decoder).__name__} cannot be compiled: {reason}")


def _holders(decoder: Any, known: Served) -> dict[int, tuple[Any, Any]]:
    """By the index of an attention layer: the decoder layer around it, and its module."""
    at = {id(layer.module): index for index, layer in enumerate(known.layers)}
    return {
        at[id(module)]: (layer, module)
        for layer in decoder.layers
        for module in layer.modules()
        if id(module) in at
    }


def check_forward(config: Any, kwargs: dict[str, Any]) -> None:
    """Raises UnsupportedError for a forward that compiled layers do not serve."""
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "compile=True: compiled layers serve inference only; call the model under "
            "torch.no_grad()"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name, getattr(config, name, False)):
            raise UnsupportedError(
                f"{name}: compiled layers hand nothing but their output on; attach with "
                "compile=False"
            )


class CompiledLayers:
    """Compiles the layers of an attached decoder that attend, until `make_eager`."""

    def __init__(
        self, attachment: Attached, decoder: Any, known: Served, hooks: frozenset[str]
    ) -> None:
        number = next(_NUMBERS)
        self._few = [FEW]
        _ATTACHMENTS[number] = attachment
        functions = _FUNCTIONS.setdefault(decoder, {})
        for index, (layer, module) in _holders(decoder, known).items():
            own = hooks if known.layers[index].window is None else frozenset[str]()
            if own not in functions:
                functions[own] = _compile(f"{number}_{len(functions)}")
            module.__dict__[PLACE] = torch.tensor([number, index]), known.rules[index]
            layer.__dict__[COMPILED] = functools.partial(
                _run, functions[own], self._few, hooks_of(layer), layer
            )

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Runs compiled layers inside, however short a prompt call is."""
        self._few[0] = 0
        try:
            yield
        finally:
            self._few[0] = FEW


def make_eager(decoder: Any, known: Served) -> None:
    """Undoes CompiledLayers."""
    for layer, module in _holders(decoder, known).values():
        layer.__dict__.pop(COMPILED, None)
        module.__dict__.pop(PLACE, None)


def _run(
    functions: Functions, least: list[int], hooks: list[Any], layer: nn.Module, *args: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    if others_in(hooks):  # dynamo sees those that were there when it traced a layer
        return _call(layer, *args, **kwargs)
    prompt, token = functions
    hidden_states = args[0] if args else kwargs["hidden_states"]
    try:
        if hidden_states.shape[1] != 1:
            few = hidden_states.shape[0] * hidden_states.shape[1] < least[0]
            return (_call if few else prompt)(layer, *args, **kwargs)
        with cold_timing():  # kernels are compared when they first run
            return token(layer, *args, **kwargs)
    except torch._dynamo.exc.Unsupported:
        layer._call_impl(*args, **kwargs)  # raises itself what dynamo quotes
        raise


def _compile(name: str) -> Functions:
    """Functions of code objects of their own, by which dynamo keeps graphs and counts them.

    Models do not use up each other's limit of recompilations, and leave no graphs behind. Prompts
    get one graph for chunks of all sizes; a token's is static until batches differ.
    """
    own = []
    for phase in ("prompt", "token"):
        code = _call.__code__.replace(co_name=f"kvpolicy_{phase}_{name}")
        own.append(types.FunctionType(code, globals(), code.co_name))
    prompt, token = own
    backend = _BACKENDS[-1]
    options = _TOKEN if backend == "inductor" else None
    return (
        torch.compile(prompt, fullgraph=True, dynamic=True, backend=backend),
        torch.compile(token, fullgraph=True, options=options, backend=backend),
    )


def _call(layer: Any, *args: Any, **kwargs: Any) -> Any:
    return layer._call_impl(*args, **kwargs)


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Runs dynamo's graphs as they are, without code for them, of what is attached inside."""
    torch._dynamo.reset()
    _BACKENDS.append("eager")
    try:
        yield
    finally:
        _BACKENDS.pop()


@contextlib.contextmanager
def cold_timing() -> Iterator[None]:
    """Lets Inductor time candidates with a cold L2, by `triton.testing.do_bench`, while it is open.

    A decode step reads every weight once, from memory. Inductor's own benchmarker writes a buffer
    as large as the L2 between two launches; most of a matrix may survive that, and kernels are
    chosen that are fast on what is cached. For Qwen3-4B's gate and up projection (100 MB) on an
    H200 it took one of 44 us where do_bench, which writes 256 MB, found one of 28. torch has no
    option for it that works after its import.
    """
    try:
        from torch._inductor.runtime import benchmarking

        own = benchmarking.benchmarker
        cold = functools.partial(benchmarking.TritonBenchmarker.benchmark_gpu, own)
        default = type(own) is benchmarking.InductorBenchmarker
        replaced = default and "benchmark_gpu" not in vars(own)
    except (ImportError, AttributeError):  # internals of torch, which may move
        replaced = False
    if not replaced:
        yield
        return
    vars(own)["benchmark_gpu"] = cold
    try:
        yield
    finally:
        del vars(own)["benchmark_gpu"]
