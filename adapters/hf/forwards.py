"""The forward in flight of an attached decoder, and the thread that runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ...errors import PhaseError, UnsupportedError
from ...pipeline import CachePipeline
from .arguments import as_given, by_name, by_position, check_forward, check_kinds, methods
from .attached import Attached
from .cache import KVPolicyCache
from .callers import GENERATION, GUIDANCE, LIBRARIES, calling, loops
from .compile import check_forward as check_compiled
from .forward import Crossing, check_inputs, close_forward, inputs_of, left_out, open_forward
from .losses import named
from .masks import closed, opened, padding_of
from .modes import check_transforms
from .moved import counting, give, moved_by
from .own_steps import aside
from .packed import split
from .positions import check_counted, first_position, true_positions
from .ranks import Ranks
from .tiles import refuse_whole
from .wrappers import check_soft_prompt, soft_prompt


class Forwards:
    """Opens a call on a cache before the decoder's forward and closes it afterwards.

    One thread at a time: another's forward raises.
    """

    def __init__(self, base: nn.Module, decoder: nn.Module, ranks: Ranks) -> None:
        self.ranks, self.moving = ranks, counting(base)
        self.names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        self.places = by_position(methods(decoder, "forward"))
        self.lock = threading.Lock()  # of owner
        self.owner: threading.Thread | None = None
        self.held = False  # by a generate in progress
        self.cache: KVPolicyCache | None = None  # of the forward in flight
        self.crossing: Crossing | None = None
        self.own = self.kept = False  # whether we made that cache, and whether to hand it out
        self.as_tuple = False
        self.closed = False  # the decoder's forward inside one of the whole model
        self.expected: KVPolicyCache | None = None  # by generate, of its first forward
        # Of the whole model, one inside another: whether given no cache, and by whose code.
        self.calls: list[tuple[bool, str]] = []
        self.planned: Any = None  # what a generate in progress made ready, a Planned
        self.warned = False

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Holds the model for this thread; another's forward or generate raises meanwhile.

        Ends alike on all ranks.
        """
        self.claim()
        outer = self.held, self.calls
        self.held, self.calls = True, []
        try:
            with self.ranks.together():
                try:
                    yield
                except BaseException as error:
                    if self.cache is not None:  # an interrupt skips forward hooks
                        self.ranks.leave(error)
                    raise
        finally:
            self.held, self.calls = outer
            self.release()

    def claim(self) -> None:
        me = threading.current_thread()
        with self.lock:
            if self.owner not in (None, me) and self.owner.is_alive():
                raise PhaseError(
                    "the attached model is running in another thread; attach a copy of it, made "
                    "before attaching"
                )
            self.owner = me
        self.take_back()  # an interrupt skips forward hooks and leaves its forward open

    def release(self) -> None:
        if not self.held:
            self.owner = None

    def take_back(self) -> None:
        """Undoes the forward in flight, if there is one."""
        cache, self.cache = self.cache, None
        if cache is not None:
            closed()
        crossing, self.crossing = self.crossing, None
        if cache is not None and cache.layout is not None:
            close_forward(cache, failed=True)
        if crossing is not None:
            crossing.undo()

    def open(self, attachment: Attached, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with which the decoder's forward goes on."""
        check_transforms()
        self.claim()
        self.closed = False
        try:
            kwargs = by_name("forward", self.places, args, kwargs)
            with self.ranks.together(functools.partial(self.ranks.key, kwargs)):
                kwargs = self._open(attachment, kwargs)
                return tuple(as_given(self.places, len(args), kwargs)), kwargs
        except BaseException:
            self.take_back()
            closed()
            self.release()
            raise

    def _open(self, attachment: Attached, kwargs: dict[str, Any]) -> dict[str, Any]:
        decoder, config = attachment.decoder, attachment.decoder.config
        if decoder.training and torch.is_grad_enabled():
            raise UnsupportedError(
                "an attached model serves inference only; detach it to train, or call model.eval()"
            )
        check_forward(decoder, attachment.layers, kwargs)
        check_kinds(config, attachment.kinds)
        attachment.names.check()
        made = isinstance(kwargs.get("attention_mask"), dict)  # by a model around the decoder
        kwargs["attention_mask"] = padding_of(kwargs.get("attention_mask"))
        if attachment.compiled is not None:
            check_compiled(config, kwargs)
        bare, caller = self.calls[-1] if self.calls else (False, self._caller())
        given = self._told(attachment.base, kwargs.get("past_key_values"), self._caller())
        if bare and _is_empty(given):
            given = None  # the model around the decoder made it
        if given is not None and not isinstance(given, KVPolicyCache):
            check_soft_prompt(attachment.model)  # which hands such caches on
        keeps = config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        kept = given is not None or keeps
        wanted = kwargs.get("return_dict")
        as_tuple = not (config.return_dict if wanted is None else wanted)
        kwargs["return_dict"] = True
        cache = kwargs["past_key_values"] = attachment.cache_for(given)
        cache.served = attachment.served  # the modules that run; the cache may be a gone model's
        ids, crossing = inputs_of(kwargs), None
        check_inputs(kwargs)
        batch, columns = ids.shape[:2]
        if cache is self.expected:
            self.expected, cache.moved = None, moved_by(self.moving)
            self.planned.check_columns(cache.boundary, cache.columns + columns)
        if cache.counts_positions and loops(caller) and not _several(kwargs):
            kwargs["position_ids"] = None  # as transformers counted them, by columns
        if "use_cache" in kwargs or "use_cache" in self.names:
            kwargs["use_cache"] = True  # some decoders hand a cache on only then
        probe = attachment.served.probe
        texts = cache.packed
        if texts is None:
            gaps = made and given is None  # by which such masks tell texts apart, cache or not
            texts = split(kwargs, batch, columns, cached=kept, apart=probe.apart, gaps=gaps)
            if texts:
                refuse_whole(attachment, "packed texts")
        self._remind(attachment.pipeline, given, columns)
        if Crossing.needed(cache, columns):
            crossing = Crossing(decoder, cache, kwargs)
            self.claim()
            kwargs, self.crossing = crossing.rest, crossing
            columns = inputs_of(kwargs).shape[1]
        open_forward(cache, batch, columns, kwargs.get("attention_mask"), texts)
        self.cache, self.as_tuple = cache, as_tuple
        self.own, self.kept = given is None, kept
        told = kwargs.get("position_ids") is not None or "position_ids" not in self.names
        # As the unconditional branch counts, and PEFT.
        by_columns = caller == GUIDANCE or soft_prompt(attachment.model) is not None
        if not told and not texts and not by_columns:
            first = first_position(cache, probe.first)
            given_ids, skips = kwargs.get("input_ids"), probe.skips if first else None
            counted = None if given_ids is None or skips is None else given_ids != skips
            kwargs["position_ids"] = true_positions(cache, ids.device, first, counted)
            cache.counted_from = None if caller.startswith(LIBRARIES) else first
        elif cache.counted_from is not None and "position_ids" in self.names:
            check_counted(cache, kwargs["position_ids"], cache.counted_from)
            cache.counted_from = None
        opened(kwargs["attention_mask"])
        return kwargs

    def close(self, attachment: Attached, output: Any) -> Any:
        """What the decoder's forward returns; None leaves `output` as it is."""
        if self.owner is not threading.current_thread() or self.cache is None:
            if output is None:
                return None  # the forward failed before it opened
            raise PhaseError(
                "another forward of the attached model ran inside this one, by a hook or method of "
                "its modules, and this one was taken back; call the model before or after it"
            )
        closed()
        try:
            if output is None:
                self.take_back()
                if (error := sys.exception()) is not None:
                    self.ranks.leave(error)
                return None
            try:
                self.ranks.vote(self.cache.failure or left_out(self.cache))
            except BaseException:
                self.take_back()
                raise
            cache, self.cache = self.cache, None
            crossing, self.crossing = self.crossing, None
            with self.ranks.together():
                close_forward(cache, failed=False)
            if crossing is not None:
                output = crossing.finish(output)
            if not self.kept and getattr(output, "past_key_values", None) is not None:
                output = dataclasses.replace(output, past_key_values=None)
            if self.own and not self.held:
                attachment.used(cache)
            if self.calls and self.calls[-1][1] != GENERATION:
                cache.moved = moved_by(self.moving)
            self.closed = True
            return output.to_tuple() if self.as_tuple else output
        finally:
            self.release()

    def before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begins a forward of the whole model; None, or the arguments with which it goes on."""
        found, caller = named(base, args, kwargs).get("past_key_values"), self._caller()
        self.calls.append((found is None, caller))
        given = self._told(base, found, caller)
        if isinstance(given, KVPolicyCache) and caller != GENERATION:
            give(self.moving, given.moved)
        return None if given is found else (args, {**kwargs, "past_key_values": given})

    def _caller(self) -> str:
        return calling() if self.held else ""

    def _told(self, base: nn.Module, given: Any, caller: str) -> Any:
        """`given`, or the cache of a generate whose loop calls and whose model puts it aside.

        An empty one, by `prepare_inputs_for_generation`, or since the model takes none by name.
        """
        if self.expected is None or not _is_empty(given) or not loops(caller):
            return given
        if self.expected.columns:
            raise UnsupportedError(aside(base))
        return self.expected

    def after(self, output: Any) -> None:
        """Ends a forward of the whole model: what follows the decoder may fail on one rank."""
        if self.calls:
            self.calls.pop()
        closed, self.closed = self.closed, False
        if output is None and closed and (error := sys.exception()) is not None:
            self.ranks.leave(error)

    def _remind(self, pipeline: CachePipeline, given: KVPolicyCache | None, columns: int) -> None:
        """Warns, once, of a loop whose prompt does not end although the pipeline would act then."""
        if self.held or self.warned or (pipeline.selection.neutral and pipeline.eviction.neutral):
            return
        if given is None:
            what = "this forward read all its tokens as a prompt"
        else:
            single = columns == 1 and given.phase == "prompt" and given.columns > 0
            given.singles = given.singles + 1 if single else 0
            if given.singles < 2:  # one may be what is left of a prompt in chunks
                return
            what = "this cache's prompt has not ended, and single tokens follow"
        self.warned = True
        warnings.warn(
            f"{what}, so that the pipeline's selection and prompt-end eviction do not act: fill a "
            "cache by attached.read(context), which ends the prompt, or call cache.end_prompt(); "
            "attached.loglikelihood(context, continuation) scores texts",
            UserWarning,
            stacklevel=3,
        )


def _is_empty(given: Any) -> bool:
    """Whether a forward's cache is none, or one of transformers' own that has seen nothing."""
    ours = isinstance(given, KVPolicyCache)
    return given is None or (not ours and isinstance(given, Cache) and not given.get_seq_length())


def _several(kwargs: dict[str, Any]) -> bool:
    """Whether a token has several positions, as where images are: only the model can count them."""
    places = kwargs.get("position_ids")
    return isinstance(places, torch.Tensor) and places.ndim > 2
