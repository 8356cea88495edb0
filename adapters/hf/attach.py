"""Attaching a pipeline to a model, and taking it off again without a trace."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn, Unpack

import torch
from torch import Tensor, nn

from ..._arguments import check_flag
from ...errors import PhaseError, UnsupportedError
from ...pipeline import CachePipeline, is_pipeline
from ...spec import Sizes
from ...store import Report
from . import phases
from .arguments import check_config, check_modules, kinds_of
from .attention import forget_hidden, keep_hidden, keep_pre, keep_query
from .cache import KVPolicyCache
from .changes import Changes
from .compile import CompiledLayers, check_compiles, make_eager
from .config_names import ConfigNames
from .forwards import Forwards
from .generate import generate
from .kept_logits import check_logits
from .losses import check_labels
from .many.questions import ask_many
from .many.requests import Finished, Request
from .many.serve import serve
from .models import AttentionLayer, check_here, check_pre_query, check_pre_rope, served
from .modes import check_transforms
from .own_steps import put_aside_at
from .planned import CHECKED, guarded
from .pooled import check_pooled
from .replay import replay
from .short_prompts import ShortPrompts
from .warm import Say, Warmed, line, warm
from .wrappers import base_of, check_decoder, check_soft_prompt, decoder_of, unwrapped

# The model's hooks keep its attachment alive; nothing here keeps the model alive.
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = (
    weakref.WeakKeyDictionary()
)


class Attachment:
    """A pipeline on a model, made by `attach`; a context manager that detaches on exit.

    Sets the names of the attention and mask functions in the decoder's config, forward hooks, one
    instance attribute, `generate`, and with `compile` what calling a layer runs, where its
    attention finds the cache, and the decoder's `forward`; `detach` takes exactly these back.
    """

    def __init__(
        self,
        model: Any,
        pipeline: CachePipeline,
        *,
        compile: bool = False,
        dtype: torch.dtype | None = None,
        verify: bool = True,
        **sizes: Unpack[Sizes],
    ) -> None:
        is_pipeline(pipeline)
        check_flag("compile", compile)
        check_flag("verify", verify)
        self.model, self.pipeline, self.sizes, self.dtype = model, pipeline, sizes, dtype
        self.base, self.decoder = base_of(model), decoder_of(base_of(model))
        check_soft_prompt(model)
        if _attached(self.decoder) is not None:
            raise PhaseError("attach: the model has a pipeline attached already; detach it first")
        check_config(self.decoder.config)
        self.served = served(self.base, verify=verify)
        self.kinds = kinds_of(self.decoder.config)
        self.layers = self.served.modules
        check_modules(self.layers)
        check_here(self.served)
        self.needs = pipeline.reads
        if "key_pre" in self.needs:
            check_pre_rope(self.served)
        if "query_pre" in self.needs:
            check_pre_query(self.served)
        empty = self.new_cache()
        self.spec, self.ranks = empty.spec, empty.ranks
        pipeline.check(self.spec, self.ranks.exchange)
        if compile:
            check_compiles(self.decoder, self.served)
        self.forwards = Forwards(self.base, self.decoder, self.ranks)
        self.ranks.listen()
        self.put_aside = put_aside_at(self.base)
        self.idle: dict[int, KVPolicyCache] = {}  # private caches to use again, by batch
        self.decoding = "not yet"  # how the last generate decoded, and why not captured
        self._given: Callable[..., Any] | None = None  # a `generate` of the model object's own
        self.names = ConfigNames(self.base, self.decoder, self.layers)
        self.names.check_replaced()
        self.compiled: CompiledLayers | None = None
        self.short_prompts: ShortPrompts | None = None
        self._last: Report | None = None
        self.changes = Changes()
        try:
            self._attach(compile)
        except BaseException:
            self.changes.undo()
            raise

    def _attach(self, compile: bool) -> None:
        decoder, changes = self.decoder, self.changes
        changes.later(self._unlist)
        _ATTACHED[decoder] = weakref.ref(self)
        changes.later(self.names.take_back)
        self.names.put()
        changes.hook(decoder, self._open, pre=True, with_kwargs=True)
        changes.hook(decoder, self._close, with_kwargs=True, always_call=True)
        if self.base is not decoder:
            changes.hook(self.base, self._before, pre=True, with_kwargs=True)
            changes.hook(self.base, self._after, with_kwargs=True, always_call=True)
        for layer in self.served.layers:
            if layer.window is None:
                self._hook(layer)
        if compile:
            changes.later(functools.partial(make_eager, decoder, self.served))
            self.compiled = CompiledLayers(self, decoder, self.served, frozenset(self.needs))
            self.short_prompts = ShortPrompts(self, self.compiled)
            if self.short_prompts.reason is None:
                changes.later(self.short_prompts.clear)
                run = functools.partial(self.short_prompts.run)
                changes.attribute(decoder, "forward", functools.wraps(decoder.forward)(run))
        target = unwrapped(self.model)
        if hasattr(target, "generate"):
            self._given = vars(target).get("generate")
            ours = functools.wraps(target.generate)(functools.partial(generate, self))
            changes.attribute(target, "generate", ours)
        if hasattr(self.base, CHECKED):
            changes.attribute(self.base, CHECKED, guarded(self, getattr(self.base, CHECKED)))

    def _hook(self, layer: AttentionLayer) -> None:
        """Lets attention see what policies read of a layer beside queries, keys and values."""
        if "key_pre" in self.needs:
            keep_pre(layer, self.changes)
        if "query_pre" in self.needs:
            keep_query(layer, self.changes)
        if "hidden" in self.needs:
            self.changes.later(functools.partial(forget_hidden, layer.module))
            self.changes.hook(layer.module, keep_hidden, pre=True, with_kwargs=True)

    def __enter__(self) -> Attachment:
        if not self.attached:
            raise PhaseError(
                "attach: this attachment was detached, by the end of its with block or detach(); "
                "write `with attach(model, pipeline):` where it begins"
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Restores the model to the letter; calling it twice does nothing."""
        if self.attached:
            self.changes.undo()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "copy: an attached model cannot be copied or pickled, since its hooks belong to one "
            "attachment; detach it first, or copy it before attaching"
        )

    def _unlist(self) -> None:
        _ATTACHED.pop(self.decoder, None)

    @property
    def original(self) -> Callable[..., Any]:
        """The `generate` that ours replaces: the model's own, or its class's as that is now."""
        if self._given is not None:
            return self._given
        target = unwrapped(self.model)
        return functools.partial(type(target).generate, target)

    # Methods of the attachment, so that the model's hooks keep it alive.
    @torch.compiler.disable
    def _open(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.forwards.open(self, args, kwargs)

    @torch.compiler.disable
    def _close(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        return self.forwards.close(self, output)

    @torch.compiler.disable
    def _before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_transforms()
        check_decoder(base, self.decoder)
        check_logits(base, args, kwargs)
        check_labels(base, args, kwargs)
        check_pooled(base, args, kwargs)
        return self.forwards.before(base, args, kwargs)

    @torch.compiler.disable
    def _after(self, base: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.forwards.after(output)

    @property
    def attached(self) -> bool:
        """Whether it is still on the model."""
        return _attached(self.decoder) is self

    @property
    def prompts(self) -> str:
        """How short prompts are read: "not yet", "captured", or "eager" with the reason."""
        if self.short_prompts is None:
            return "eager: attach(compile=True) captures them"
        return self.short_prompts.said

    @property
    def cache(self) -> KVPolicyCache | None:
        """The cache of the forward in flight."""
        return self.forwards.cache

    def new_cache(self) -> KVPolicyCache:
        """An empty cache of this pipeline."""
        return KVPolicyCache(
            self.base, self.pipeline, dtype=self.dtype, known=self.served, **self.sizes
        )

    def cache_for(self, given: Any, name: str = "past_key_values") -> KVPolicyCache:
        """`given` if it is a cache of this pipeline, a new cache for None.

        Raises TypeError for what is no KVPolicyCache, ValueError for one of another pipeline, model
        or size, by the argument's `name`.
        """
        if given is None:
            return self.new_cache()
        if not isinstance(given, KVPolicyCache):
            raise TypeError(
                f"{name}: wanted a KVPolicyCache from new_cache(model, pipeline), got "
                f"{type(given).__name__}; pass attached.new_cache(), also to a model that else "
                "makes a cache of its own, or call generate of the model that was attached"
            )
        if given.pipeline is not self.pipeline and given.pipeline != self.pipeline:
            raise ValueError(f"{name}: the cache belongs to another pipeline; attach that one")
        model = given.model()  # None if it is gone
        other = model is not None and decoder_of(model) is not self.decoder
        if other or given.spec.each != self.spec.each:
            raise ValueError(f"{name}: the cache was made for another model; take a new one")
        return given

    def read(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: KVPolicyCache | None = None,
        chunk_size: int | None = None,
    ) -> KVPolicyCache:
        """A cache filled with a context, or `cache` after its next turn; the prompt has ended.

        `input_ids` and `attention_mask` `[B, S]` are of the new columns. `chunk_size` cuts the
        context into forwards of so many columns.
        """
        return phases.read(self, input_ids, attention_mask, inputs_embeds, cache, chunk_size)

    def replay(
        self,
        cache: KVPolicyCache,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        span: range | None = None,
        sinks: int = 4,
    ) -> None:
        """Lets tokens `[B, S]`, or `[B, S, hidden]` embedded, look back at what `cache` holds.

        Before its prompt ends. For evictions that want it, such as `KVzip`, whose passes `repeats`
        gives, and `JudgeQ`; the cache holds what it held before. See `CachePipeline.replay`.
        """
        replay(self, cache, input_ids, inputs_embeds, attention_mask, span, sinks)

    def ask(
        self,
        cache: KVPolicyCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        question: str = "decode",
        **options: Any,
    ) -> Any:
        """Generates on a fork of `cache` after a question `[B, S]`, without another eviction.

        A cache of one sequence is asked every row of `input_ids`. The question's tokens are decoded
        tokens, which select ("decode"), or a prompt, which reads all that is left ("prompt").
        `options` and the answer are generate's: ids begin with the question.
        """
        return phases.ask(self, cache, input_ids, attention_mask, question, options)

    def loglikelihood(
        self,
        input_ids: Tensor,
        continuation_ids: Tensor,
        attention_mask: Tensor | None = None,
        continuation_mask: Tensor | None = None,
        *,
        question: str = "decode",
    ) -> Tensor:
        """Log-probabilities `[B, N]` of continuations `[B, N]` after contexts `[B, S]`.

        The prompt ends, and evictions act, before a context's last token; it and the continuation
        are read as `ask` reads a question. Contexts are padded on the left, continuations on the
        right; padding of these counts 0.
        """
        return phases.loglikelihood(
            self, input_ids, continuation_ids, attention_mask, continuation_mask, question
        )

    def generate_many(
        self,
        requests: Iterable[Request | None],
        *,
        slots: int = 16,
        tokens_per_call: int = 8192,
        shared_prefix: str | Tensor | Sequence[int] | None = None,
        max_bytes: int | None = None,
        tokenizer: Any = None,
    ) -> Iterator[Finished]:
        """Serves many requests, up to `slots` at once; gives each as it finishes.

        Each gets what `generate` gives it alone. Prompts are read in calls of up to
        `tokens_per_call` tokens of any of them, with a decode step after each call. Requests are
        taken one after another when there is room; None among them says that there is none for now.
        Those of a list are checked beforehand, one of another iterable that cannot be served
        finishes with its error.

        Args:
            requests: what to serve; their order is that in which they enter.
            slots: sequences that decode together.
            tokens_per_call: of prompts between two steps, which bounds the time between tokens.
            shared_prefix: ids, or a text, with which prompts begin; read once. Those that begin
                with something else are read whole.
            max_bytes: of all pages, by default the attachment's, else 0.8 of what a GPU has free.
            tokenizer: for texts and stop strings.

        Raises:
            UnsupportedError: for models and options that cannot share calls, by name.
        """
        return serve(self, requests, slots, tokens_per_call, shared_prefix, max_bytes, tokenizer)

    def ask_many(
        self,
        cache: KVPolicyCache,
        requests: Collection[Request],
        *,
        rows: Sequence[int] | None = None,
        slots: int = 16,
        tokenizer: Any = None,
    ) -> Iterator[Finished]:
        """Asks many questions about what `cache` holds, up to `slots` at once, as they finish.

        Each gets what `ask` gives it alone on a fork of its sequence, as decoded tokens; one that
        has its answer makes room for the next. The cache stays as it was.

        Args:
            cache: what read the contexts, its prompt ended.
            requests: questions, whose ids or texts follow what the cache holds.
            rows: which of the cache's sequences each asks; a cache of one needs none.
            slots: sequences that decode together.
            tokenizer: for texts and stop strings.

        Raises:
            UnsupportedError: where `generate_many` does, and for evictions that act while decoding.
        """
        return ask_many(self, cache, requests, rows, slots, tokenizer)

    def warm(self, batch: int = 16, length: int | None = None, say: Say | None = None) -> Warmed:
        """Compiles what requests will need, by requests of made-up tokens.

        What is compiled stays in this process, and in the caches of Triton and Inductor on disk,
        from which the next process reads it.

        Args:
            batch: sequences that decode together, at most.
            length: tokens of the longest prompt, by default 8192 or what the model has positions
                for; so many go through the model, and through the cache.
            say: called with how many of these requests ran, of how many, and what is next.
        """
        before = self._last, self.decoding
        try:
            return warm(self, batch, length, say)
        finally:
            self._last, self.decoding = before

    def used(self, cache: KVPolicyCache) -> None:
        """Remembers what a cache did that no caller gave."""
        if cache.state is not None:
            self._last = cache.report(all_ranks=True)

    def last_report(self) -> Report:
        """What took effect in the last cache that no caller gave: of a generate or a forward.

        Of all heads, also where ranks share the model. Raises PhaseError before the first.
        """
        if self._last is None:
            raise PhaseError("last_report: no generate or forward made a cache of its own yet")
        return self._last


def _attached(decoder: nn.Module) -> Attachment | None:
    found = _ATTACHED.get(decoder)
    return None if found is None else found()


def attach(
    model: nn.Module,
    pipeline: CachePipeline,
    *,
    compile: bool = False,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    warm: bool = False,
    **sizes: Unpack[Sizes],
) -> Attachment:
    """Attaches `pipeline` to `model`; use as `with attach(model, pipeline): model.generate(...)`.

    Serves, in eval mode, every decoder whose attention does what the cache needs. Whether it does
    is found out by a short forward, once for a configuration; without `verify`, its numbers are not
    compared with the model's own attention (see `kvpolicy models`). `compile` compiles the decoder
    layers by `torch.compile` at their first calls, around the attention. `warm` compiles all that
    requests will need before it returns, with a line on stderr (see `Attachment.warm`). `dtype` is
    what caches store and compute in, by default the model's; `sizes` are those of CacheSpec for the
    caches it makes: `page_size`, `rollback` and `interval` in tokens, and the caps `max_bytes`,
    `max_tokens` (of a KV head) with `at_cap`. Raises UnsupportedError for other models, ValueError
    for policies that do not fit, PhaseError for a second attach.
    """
    check_flag("warm", warm)
    given: Any = {"compile": compile, "dtype": dtype, "verify": verify, **sizes}
    if warm:
        return _warmed(Attachment(model, pipeline, **given))
    return Attachment(model, pipeline, **given)


def _warmed(attachment: Attachment) -> Attachment:
    try:
        attachment.warm(say=line)
        return attachment
    except BaseException:
        attachment.detach()
        raise


def detach(model: nn.Module) -> None:
    """Takes the pipeline off `model`."""
    _of(model, "detach").detach()


def generate_many(
    model: nn.Module,
    requests: Iterable[Request | None],
    *,
    slots: int = 16,
    tokens_per_call: int = 8192,
    shared_prefix: str | Tensor | Sequence[int] | None = None,
    max_bytes: int | None = None,
    tokenizer: Any = None,
) -> Iterator[Finished]:
    """Serves many requests on a model that a pipeline is attached to.

    Arguments and answers as in `Attachment.generate_many`. Raises PhaseError where none is.
    """
    return _of(model, "generate_many").generate_many(
        requests,
        slots=slots,
        tokens_per_call=tokens_per_call,
        shared_prefix=shared_prefix,
        max_bytes=max_bytes,
        tokenizer=tokenizer,
    )


def _of(model: nn.Module, what: str) -> Attachment:
    attachment = _attached(decoder_of(base_of(model)))
    if attachment is None:
        raise PhaseError(f"{what}: no pipeline is attached to this model")
    return attachment
