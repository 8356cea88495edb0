"""Attaching a pipeline to a model, and taking it off again without a trace."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import nn

from ...errors import PhaseError, UnsupportedError
from ...pipeline import CachePipeline, is_pipeline
from ...spec import CacheSpec, Sizes
from . import attention as attention
from .attention import forget_kept, keep_hidden, keep_pre
from .cache import KVPolicyCache, new_cache
from .compile import CompiledLayers, check_compiles, check_forward
from .faces import NAME
from .forward import POSITIONAL, Crossing, close_forward, inputs_of, open_forward, true_positions
from .generate import generate
from .models import attention_modules, decoder_of, key_source

# The model's hooks keep its attachment alive; nothing here keeps the model alive.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = (
    weakref.WeakKeyDictionary()
)


class Attachment:
    """A pipeline on a model; a context manager that detaches on exit.

    Sets the names of the attention and mask functions in the model's config, forward hooks, one
    instance attribute, `generate`, and with `compile` what calling a layer runs and where its
    attention finds the cache; `detach` takes exactly these back.
    """

    def __init__(
        self, model: Any, pipeline: CachePipeline, *, compile: bool = False, **sizes: Unpack[Sizes]
    ) -> None:
        is_pipeline(pipeline)
        layers = attention_modules(model)
        decoder = decoder_of(model)
        if _attached(decoder) is not None:
            raise PhaseError("attach: the model has a pipeline attached already; detach it first")
        self.model, self.pipeline, self.sizes = model, pipeline, sizes
        self.spec = new_cache(model, pipeline, **sizes).spec
        pipeline.check(self.spec)
        if compile:
            check_compiles(decoder, layers)
        self.decoder = decoder
        self.base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.lock = threading.Lock()  # of owner
        self.owner: threading.Thread | None = None
        self.held = False  # by a generate in progress
        self.cache: KVPolicyCache | None = None  # of the forward in flight
        self.crossing: Crossing | None = None
        self.idle: dict[int, KVPolicyCache] = {}  # private caches with a captured graph, by batch
        self.decoding = "not yet"  # how the last generate decoded, and why not captured
        # Several models may share one config, which tells all of them the attention's name.
        sharing = next(self._sharing(), None)
        config = self.base.config
        self.previous: str | None = sharing.previous if sharing else config._attn_implementation
        self.original, self.replaced = model.generate, model.__dict__.get("generate")
        self.base.set_attn_implementation(NAME)
        self.handles = [
            decoder.register_forward_pre_hook(self._open, with_kwargs=True),
            decoder.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]
        needs = (pipeline.admission.needs | pipeline.eviction.needs) & {"key_pre", "hidden"}
        for module in layers:
            if "key_pre" in needs:
                self.handles.append(key_source(module).register_forward_hook(keep_pre))
            if "hidden" in needs:
                self.handles.append(module.register_forward_pre_hook(keep_hidden, with_kwargs=True))
        self.compiled = CompiledLayers(self, decoder, layers, needs) if compile else None
        model.generate = functools.wraps(self.original)(functools.partial(generate, self))
        _ATTACHED[decoder] = weakref.ref(self)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Restores the model to the letter; calling it twice does nothing."""
        if _attached(self.decoder) is not self:
            return
        del _ATTACHED[self.decoder]
        for handle in self.handles:
            handle.remove()
        if next(self._sharing(), None) is None:
            self.base.set_attn_implementation(self.previous)
        del self.model.__dict__["generate"]
        if self.replaced is not None:
            self.model.__dict__["generate"] = self.replaced
        if self.compiled is not None:
            self.compiled.remove()
        for module in attention_modules(self.model):
            forget_kept(module)

    def _sharing(self) -> Iterator[Attachment]:
        """Other attachments whose model has the same config object."""
        others = [found() for found in _ATTACHED.values()]
        return (a for a in others if a and a is not self and a.base.config is self.base.config)

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
        model = given.model()  # None if it is gone
        other = model is not None and decoder_of(model) is not self.decoder
        if other or _shape(given.spec) != _shape(self.spec):
            raise ValueError("past_key_values: the cache was made for another model")
        return given

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Holds the model for this thread; another's forward or generate raises meanwhile."""
        self._claim()
        outer, self.held = self.held, True
        try:
            yield
        finally:
            self.held = outer
            self._release()

    def _claim(self) -> None:
        me = threading.current_thread()
        with self.lock:
            if self.owner not in (None, me) and self.owner.is_alive():
                raise PhaseError(
                    "the attached model is running in another thread; attach a copy of it"
                )
            self.owner = me
        self._take_back()  # an interrupt skips forward hooks and leaves its forward open

    def _release(self) -> None:
        if not self.held:
            self.owner = None

    def _take_back(self) -> None:
        """Undoes the forward in flight, if there is one."""
        cache, self.cache = self.cache, None
        crossing, self.crossing = self.crossing, None
        if cache is not None and cache.layout is not None:
            close_forward(cache, failed=True)
        if crossing is not None:
            crossing.undo()

    def _open(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._claim()
        try:
            if decoder.training and torch.is_grad_enabled():
                raise UnsupportedError(
                    "an attached model serves inference only; detach it to train, or call "
                    "model.eval()"
                )
            kwargs = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
            if self.compiled is not None:
                check_forward(decoder.config, kwargs)
            cache = self.cache_for(kwargs.get("past_key_values"))
            kwargs["past_key_values"] = cache
            ids, crossing = inputs_of(kwargs), None
            if Crossing.needed(cache, ids.shape[1]):
                crossing = Crossing(decoder, cache, kwargs)
                self._claim()
                kwargs, self.crossing = crossing.rest, crossing
                ids = inputs_of(kwargs)
            open_forward(cache, ids.shape[0], ids.shape[1], kwargs.get("attention_mask"))
            self.cache = cache
            if cache.counts_positions or kwargs.get("position_ids") is None:
                kwargs["position_ids"] = true_positions(cache, ids.device)
            return (), kwargs
        except BaseException:
            self._take_back()
            self._release()
            raise

    def _close(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.owner is not threading.current_thread() or self.cache is None:
            return None  # the forward failed before it opened
        try:
            if output is None:
                self._take_back()
                return None
            cache, self.cache = self.cache, None
            crossing, self.crossing = self.crossing, None
            close_forward(cache, failed=False)
            return None if crossing is None else crossing.finish(output)
        finally:
            self._release()


def _shape(spec: CacheSpec) -> tuple[int, ...]:
    return spec.layers, spec.heads, spec.kv_heads, spec.head_dim


def _attached(decoder: nn.Module) -> Attachment | None:
    found = _ATTACHED.get(decoder)
    return None if found is None else found()


def attach(
    model: nn.Module, pipeline: CachePipeline, *, compile: bool = False, **sizes: Unpack[Sizes]
) -> Attachment:
    """Attaches `pipeline` to `model`; use as `with attach(model, pipeline): model.generate(...)`.

    Serves Llama, Mistral, Qwen2 and Qwen3 in eval mode. `compile` compiles the decoder layers by
    `torch.compile` at their first calls, around the attention. `sizes` are those of CacheSpec for
    the caches it makes: `page_size`, `rollback` and `interval` in tokens, and the caps `max_bytes`,
    `max_tokens` (of a KV head) with `at_cap`. Raises UnsupportedError for other models, ValueError
    for policies that do not fit, PhaseError for a second attach.
    """
    return Attachment(model, pipeline, compile=compile, **sizes)


def detach(model: nn.Module) -> None:
    """Takes the pipeline off `model`."""
    attachment = _attached(decoder_of(model))
    if attachment is None:
        raise PhaseError("detach: no pipeline is attached to this model")
    attachment.detach()
