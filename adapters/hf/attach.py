"""Attaching a pipeline to a model, and taking it off again without a trace."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import close_call
from ...errors import PhaseError, UnsupportedError
from ...pipeline import CachePipeline
from ...store.rollback import abort
from . import attention as attention
from .attention import HIDDEN, PRE
from .cache import NAME, KVPolicyCache, new_cache
from .generate import generate
from .plan import Plan, plan_decode, plan_prompt
from .spec import attention_modules, decoder_of

_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


class Attachment:
    """A pipeline on a model; a context manager that detaches on exit.

    Sets the names of the attention and mask functions in the model's config, forward hooks, and one
    instance attribute, `generate`; `detach` takes exactly these back.
    """

    def __init__(self, model: nn.Module, pipeline: CachePipeline, **sizes: int) -> None:
        if not isinstance(pipeline, CachePipeline):
            raise TypeError(f"pipeline: wanted a CachePipeline, got {type(pipeline).__name__}")
        layers = attention_modules(model)
        decoder = decoder_of(model)
        if decoder in _ATTACHED:
            raise PhaseError("attach: the model has a pipeline attached already; detach it first")
        self.model, self.pipeline, self.sizes = model, pipeline, sizes
        new_cache(model, pipeline, **sizes)  # policies that do not fit fail here
        self.decoder = decoder
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.lock = threading.Lock()
        self.idle: dict[int, KVPolicyCache] = {}  # private caches with a captured graph, by batch
        self.decoding = "not yet"  # how the last generate decoded, and why not captured
        self.previous = self.base.config._attn_implementation
        self.original = model.generate
        self.base.set_attn_implementation(NAME)
        self.handles = [
            decoder.register_forward_pre_hook(self._open, with_kwargs=True),
            decoder.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]
        needs = pipeline.admission.needs | pipeline.eviction.needs
        for module in layers:
            source = module.k_norm if hasattr(module, "k_norm") else module.k_proj
            self.handles.append(
                source.register_forward_hook(functools.partial(_keep, module.__dict__))
            )
            if "hidden" in needs:
                self.handles.append(
                    module.register_forward_pre_hook(_keep_hidden, with_kwargs=True)
                )
        model.generate = functools.wraps(self.original)(functools.partial(generate, self))
        _ATTACHED[decoder] = self

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Restores the model to the letter; calling it twice does nothing."""
        if _ATTACHED.get(self.decoder) is not self:
            return
        del _ATTACHED[self.decoder]
        for handle in self.handles:
            handle.remove()
        self.base.set_attn_implementation(self.previous)
        del self.model.__dict__["generate"]
        for module in attention_modules(self.model):
            module.__dict__.pop(PRE, None)
            module.__dict__.pop(HIDDEN, None)

    def new_cache(self) -> KVPolicyCache:
        """An empty cache of this pipeline."""
        return new_cache(self.model, self.pipeline, **self.sizes)

    def cache_for(self, given: Any) -> KVPolicyCache:
        """`given` if it is a cache of this pipeline, a new cache for None."""
        if given is None:
            return self.new_cache()
        if not isinstance(given, KVPolicyCache):
            raise TypeError(
                f"past_key_values: wanted a KVPolicyCache from new_cache(model, pipeline), got "
                f"{type(given).__name__}"
            )
        if given.pipeline is not self.pipeline and given.pipeline != self.pipeline:
            raise ValueError("past_key_values: the cache belongs to another pipeline")
        return given

    def _open(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.lock.acquire(blocking=False):
            raise PhaseError("the attached model is running in another thread; attach a copy of it")
        try:
            if decoder.training and torch.is_grad_enabled():
                raise UnsupportedError(
                    "an attached model serves inference only; detach it to train, or call model.eval()"
                )
            cache = self.cache_for(kwargs.get("past_key_values"))
            ids = kwargs.get("inputs_embeds")
            ids = ids if ids is not None else kwargs.get("input_ids", args[0] if args else None)
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            open_forward(cache, ids.shape[0], ids.shape[1], mask)
            kwargs["past_key_values"] = cache
            return args, kwargs
        except BaseException:
            self.lock.release()
            raise

    def _close(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, KVPolicyCache) or cache.plan is None:
            return  # the forward failed before it opened
        try:
            close_forward(cache, failed=output is None)
        finally:
            self.lock.release()


def open_forward(cache: KVPolicyCache, batch: int, columns: int, mask: Tensor | None) -> None:
    """Plans a forward and opens the call on the cache's state."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UnsupportedError(
            "attention_mask: wanted a 2D mask of real tokens [B, columns]; custom 4D masks are not served"
        )
    state = cache.ensure_state(batch)
    mask = None if mask is None else mask[:, -columns:]
    if mask is not None and mask.shape != (batch, columns):
        raise ValueError(
            f"attention_mask: wanted at least [{batch}, {columns}], got {list(mask.shape)}"
        )
    if cache.phase == "prompt":
        if cache.boundary is not None and cache.columns + columns > cache.boundary:
            _crossing(cache, cache.columns + columns - cache.boundary)
        plan, lengths = plan_prompt(batch, columns, mask)
        cache.pipeline.begin(state, lengths, "prompt")
    else:
        plan, lengths, valid = plan_decode(batch, columns, mask)
        cache.pipeline.begin(state, lengths, "decode", valid=valid)
    cache.plan = plan


def _crossing(cache: KVPolicyCache, extra: int) -> None:
    """Candidate tokens in the prompt's forward: the same thing only if phases do not matter."""
    pipeline = cache.pipeline
    if not (pipeline.selection.neutral and pipeline.eviction.neutral):
        raise UnsupportedError(
            f"assisted decoding puts {extra} candidate tokens into the prompt's forward, where "
            f"{type(pipeline.selection).__name__} and {type(pipeline.eviction).__name__} would act "
            "differently; use an admission only, or plain decoding"
        )


def close_forward(cache: KVPolicyCache, failed: bool) -> None:
    """Commits the call, or takes it back."""
    plan, cache.plan = cache.plan, None
    state = cache.state
    assert plan is not None and state is not None
    if failed:
        abort(state)
        return
    if cache.capturing:
        close_call(state)
        return
    cache.pipeline.commit(state)
    valid = plan.valid
    if plan.decode and not all(state.active):
        valid = torch.tensor(state.active)[:, None].expand(plan.batch, plan.decode)
    cache.saw(plan.prompt + plan.decode, valid)
    if cache.phase == "prompt" and cache.boundary is not None and cache.columns >= cache.boundary:
        cache.end_prompt()


def _keep(slot: dict[str, Any], module: nn.Module, args: Any, output: Tensor) -> None:
    slot[PRE] = output


def _keep_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    module.__dict__[HIDDEN] = kwargs.get("hidden_states", args[0] if args else None)


def attach(model: nn.Module, pipeline: CachePipeline, **sizes: int) -> Attachment:
    """Attaches `pipeline` to `model`; use as `with attach(model, pipeline): model.generate(...)`.

    Serves Llama, Mistral, Qwen2 and Qwen3 in eval mode. `sizes` are `page_size`, `rollback` and
    `interval` of the caches it makes. Raises UnsupportedError for other models, ValueError for
    policies that do not fit, PhaseError for a second attach.
    """
    return Attachment(model, pipeline, **sizes)


def detach(model: nn.Module) -> None:
    """Takes the pipeline off `model`."""
    attachment = _ATTACHED.get(decoder_of(model))
    if attachment is None:
        raise PhaseError("detach: no pipeline is attached to this model")
    attachment.detach()
