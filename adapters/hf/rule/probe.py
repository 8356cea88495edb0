"""Whether a model keeps the contract of a cache: a short forward on the model itself decides."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import sys
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
import transformers
from torch import Tensor, nn

from ....errors import UnsupportedError
from ..wrappers import base_of, fully_sharded, takes_positions
from .carried import Carried, counts_from
from .cut import cut_model, whole, why_not_in_place
from .handle import Touched, place_of
from .kinds import LayerKind, layer_kinds
from .own_run import OwnRun
from .placed import Placed
from .probe_attention import rounding
from .probe_run import ProbeRun
from .records import ModelRefused as ModelRefused
from .records import PreRope as PreRope
from .records import Probe as Probe
from .records import ProbedLayer as ProbedLayer
from .records import Rotation as Rotation
from .runs import PROMPT, STEPS
from .untouched import untouched

_KNOWN: dict[Any, Probe] = {}
_LIBRARIES = ("torch", "transformers", "accelerate")
NO_DECODER = "only decoders are served, as AutoModelForCausalLM loads them, no encoders"


def probe(model: Any, *, again: bool = False, verify: bool = True) -> Probe:
    """What a cache must know of `model`, checked by a prompt and a decode step on it.

    It runs in place, on the model's own weights, and leaves the model as it was. A configuration
    that passed is not run again but with `again`, or where modules were given forwards that are not
    their class's. Without `verify` logits may differ by anything, and the next probe runs again.
    Each attention call is compared in float32 at least, and logits may differ by `tolerance`. In 16
    bits, or where rounding grew over the layers, the model goes on from each call with its own
    attention's result.

    Where weights are offloaded, quantised or sharded and the forward fails, a random model of the
    config is probed instead, cut to the layers that have each kind.

    Raises:
        ModelRefused: a check failed; it says which, in which layer and where in the model's code.
    """
    base = base_of(model)
    key = _configuration(base)
    of_its_class = not _patched(base)
    known = _KNOWN.get(key) if of_its_class and not again else None
    if known is not None and _has(base, known):
        layers = [
            attrs.evolve(layer, device=_device_of(base.get_submodule(layer.module), layer.device))
            for layer in known.layers
        ]
        return attrs.evolve(known, layers=tuple(layers), cached=True)
    try:
        with _traced_by_nobody():
            found = _probe(base, verify)
    except ModelRefused as error:
        if not _generates(base) and error.check in ("attention", "forward"):
            error.args = (f"{error}; {NO_DECODER}",)
        raise
    if verify and of_its_class:
        _KNOWN[key] = found
    return found


def _generates(model: Any) -> bool:
    """Whether it is a language model with its head, by transformers' own word."""
    asked = getattr(model, "can_generate", None)
    return bool(asked and asked())


def _traced_by_nobody() -> AbstractContextManager[Any]:
    """Models that were compiled in place run eagerly inside, where dynamo would trace what watches.

    Nothing is compiled where dynamo was never imported, which takes seconds.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _probe(model: Any, verify: bool) -> Probe:
    obstacle = why_not_in_place(model)
    if not obstacle:
        return probe_in_place(model, verify)
    try:
        meta = any(weight.device.type == "meta" for weight in model.parameters())
        if meta or fully_sharded(model):  # whose hooks swap weights while it runs
            raise ModelRefused("weights are not here", check="forward")
        return probe_in_place(model, verify)
    except ModelRefused as error:
        if error.check != "forward":
            raise
        reason = f"{obstacle}, and in place {error.reason}"
    check_kinds(model.config)
    return whole(model, probe_in_place(_checked(lambda: cut_model(model), "cut"), verify), reason)


def tolerance(dtype: torch.dtype, calls: int) -> float:
    """How far logits may differ, as a part of their spread, after `calls` attention calls.

    Each call adds rounding errors, which the layers after it make larger by some factor. In 16 bits
    the calls add none, as the model goes on with its own attention: what is left are sums in
    another order.
    """
    eps = rounding(dtype)
    return 256 * eps * math.sqrt(1 + calls) if dtype.itemsize >= 4 else 16 * eps


def probe_in_place(model: Any, verify: bool = True) -> Probe:
    """`probe` without what is remembered, on transformers' model itself."""
    kinds = check_kinds(model.config)
    tokens = _tokens(model)
    with untouched(model):
        own = OwnRun(model)
        failure = "its forward of tokens [1, S] on transformers' own cache fails"
        expected = _checked(lambda: own.run(tokens), failure)
    found = None
    for follow in (False, True):
        with untouched(model):
            run = ProbeRun(model, kinds, own.calls, follow=follow)
            logits = _checked(
                functools.partial(run.run, tokens), "its forward fails without a mask"
            )
        worst, found = _compared(expected, logits, run)
        # Where rounding grew over the layers, it does not if each goes on with its own attention.
        if found is None:
            break
    if found is not None and verify:
        raise found
    passed = Probe(layers=tuple(run.layers), kinds=kinds, difference=worst, decoded=True)
    passed = _counted(model, passed, run, tokens)
    if takes_positions(model):
        placed = Placed(model, tokens)
        passed = attrs.evolve(passed, first=placed.first, skips=placed.skips, apart=placed.apart)
        if not passed.own:
            return passed
    carried = Carried(model, tokens)
    return attrs.evolve(passed, hides=carried.hides, goes_on=carried.goes_on)


def _counted(model: Any, passed: Probe, run: ProbeRun, tokens: Tensor) -> Probe:
    """With what the attention modules count by themselves, if it shows."""
    modules = {name: model.get_submodule(name) for name in {x.module for x in passed.layers}}
    places = {n: run.cache.counted[id(x)] for n, x in modules.items() if id(x) in run.cache.counted}
    found = counts_from(model, places, tokens) if places else None
    if found is None:
        return passed
    counting = tuple(x.layer for x in passed.layers if x.module in places)
    place = min(places.values())
    return attrs.evolve(passed, counts=place, counts_from=found, counting=counting)


def _compared(
    expected: list[Tensor], logits: list[Tensor], run: ProbeRun
) -> tuple[float, ModelRefused | None]:
    """The largest difference as a part of what is allowed, and the refusal if it is larger."""
    worst = run.worst
    every = torch.cat([theirs.double().flatten() for theirs in expected])
    for phase, theirs, ours in zip(("the prompt", "a decode step"), expected, logits, strict=True):
        wide = theirs.double() if theirs.numel() > 1 else every  # one number has no spread
        spread = float(wide.std().clamp(min=1e-9))
        far = float((theirs.double() - ours.double()).abs().max()) / spread
        bound = tolerance(theirs.dtype, len(run.layers))
        if not far <= bound:
            return far / bound, ModelRefused(
                f"logits of {phase} differ by {far:.2g} of their spread, rounding allows "
                f"{bound:.2g}",
                check="logits",
            )
        worst = max(worst, far / bound)
    return worst, None


def check_kinds(config: Any) -> tuple[LayerKind, ...]:
    """The kinds of the layers; raises ModelRefused where one is not served, or none keeps keys."""
    try:
        kinds = layer_kinds(config)
    except UnsupportedError as error:
        raise ModelRefused(str(error).removeprefix("model: "), check="kinds") from None
    except (AttributeError, ValueError, TypeError) as error:
        reason = f"transformers finds no kinds of layers in its config: {error}"
        raise ModelRefused(reason, check="kinds") from error
    if not any(kind.attention for kind in kinds):
        raise ModelRefused("no layer keeps keys and values", check="kinds")
    return kinds


def _checked(function: Any, failure: str) -> Any:
    """Runs, and says of an error which check failed and where in the model's code."""
    try:
        return function()
    except ModelRefused as error:
        if error.place:
            raise
        place, _ = place_of(error)
        raise ModelRefused(
            error.reason, check=error.check, layer=error.layer, module=error.module, place=place
        ) from None
    except Exception as error:
        module, layer = _module_of(error)
        place, line = place_of(error)
        touched = _touched(error)
        reason = str(touched) if touched else f"{failure}: {type(error).__name__}: {error}"
        raise ModelRefused(
            f"{reason}: {line}" if line else reason,
            check="handle" if touched else "forward",
            layer=layer,
            module=module,
            place=place,
        ) from error


def _touched(error: BaseException | None) -> Touched | None:
    while error is not None and not isinstance(error, Touched):
        error = error.__cause__ or error.__context__
    return error


def _module_of(error: BaseException) -> tuple[str, int | None]:
    """The innermost module that was running, and its layer."""
    name, layer, trace = "", None, error.__traceback__
    while trace is not None:
        running = trace.tb_frame.f_locals.get("self")
        if isinstance(running, nn.Module):
            name = type(running).__name__
            index = getattr(running, "layer_idx", None)
            layer = index if isinstance(index, int) else layer
        trace = trace.tb_next
    return name, layer


def _tokens(model: Any) -> Tensor:
    """Tokens `[1, S]` that stand for themselves only, on the device of the embeddings."""
    try:
        weight = next(model.get_input_embeddings().parameters())
    except (NotImplementedError, AttributeError, StopIteration):
        raise ModelRefused("its get_input_embeddings embeds no tokens", check="forward") from None
    config = model.config.get_text_config(decoder=True)
    size = int(getattr(config, "vocab_size", None) or weight.shape[0])
    special = {
        value
        for held in (model.config, config)
        for name, value in held.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    plain = [token for token in range(min(size, 4096)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(plain), (1, PROMPT + STEPS), generator=generator)
    return torch.tensor(plain)[chosen].to(weight.device)


def _configuration(model: Any) -> Any:
    """What models must have in common for one's probe to vouch for another."""
    said = json.dumps(model.config.to_diff_dict(), sort_keys=True, default=str)
    return (
        transformers.__version__,
        hashlib.sha256(said.encode()).hexdigest(),
        frozenset(type(module) for module in model.modules()),
        frozenset((p.dtype, p.device.type) for p in model.parameters()),
        str(getattr(model, "_device_mesh", None)),
    )


def _patched(model: Any) -> bool:
    """Whether a module has a forward of its own, which no other of its class vouches for.

    Those of libraries, which shard and move what the class's takes and gives, do not count.
    """
    own = (vars(module).get("forward") for module in model.modules())
    return any(forward is not None and library(forward) not in _LIBRARIES for forward in own)


def library(function: Any) -> str:
    """The package that a function is written in, whatever it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    name: str = getattr(function, "__globals__", {}).get("__name__", "")
    return name.partition(".")[0]


def _has(model: Any, found: Probe) -> bool:
    names = {name for name, _ in model.named_modules()}
    wanted = {layer.module for layer in found.layers}
    wanted |= {layer.pre_rope.module for layer in found.layers if layer.pre_rope}
    wanted |= {layer.pre_query.module for layer in found.layers if layer.pre_query}
    wanted |= {layer.output for layer in found.layers}
    return wanted <= names | {""}


def _device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    hook = getattr(module, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is not None:
        return torch.device(place)
    held = next((x for x in [*module.parameters(), *module.buffers()]), None)
    return otherwise if held is None or held.device.type == "meta" else held.device
