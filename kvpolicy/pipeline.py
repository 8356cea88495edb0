"""CachePipeline: admission, selection and eviction composed over one store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Unpack, cast

import attrs
from torch import Tensor, nn

from ._arguments import check_flag, check_kind
from ._fields import check_int, one_of, optional, positive, shown
from ._names import named
from ._slots import instead, slot_field
from .admission import Admission, AdmitAll
from .backend import BACKENDS, resolve
from .calls import capacity
from .calls._checks import check_call, check_complete, check_layer, check_shared
from .calls.call import abort, close_call, open_call
from .calls.decode import decode, read_decoded
from .calls.evict import evict
from .calls.fit import check_policies
from .calls.prompt import prompt, read_prompt
from .calls.tell import Known, tell
from .choices import Backend, Phase
from .errors import BackendError, PhaseError, UnsupportedError
from .eviction import Eviction, KeepAll
from .exchange import ALONE, Exchange
from .ops import Ops, load
from .selection import SelectAll, Selection
from .spec import CacheSpec
from .store import CacheState, Report, moments
from .store.allocate import allocate
from .store.checks import check_state
from .store.layer import check_sinks
from .store.looked_back import adopt_numbers, fork_to_replay, looks_back
from .store.report import report

DEFAULT_WINDOW = 256


def _of_model(value: Any) -> str:
    """What to write where a model was given for its sizes."""
    return "write kvpolicy.adapters.hf.spec_of(model)" if isinstance(value, nn.Module) else ""


def is_pipeline(value: Any) -> None:
    """Raises TypeError for anything but a CachePipeline."""
    if isinstance(value, CachePipeline):
        return
    one = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    fits = instead(one)
    if isinstance(value, type):
        hint = f"; write {value.__name__}(...)" if issubclass(value, CachePipeline) else ""
    elif isinstance(value, nn.Module):
        hint = "; write the model first"
    elif isinstance(value, str) and value.endswith((".json", ".yaml", ".yml")):
        hint = f"; write load_pipeline({value!r})"
    else:
        hint = f"; write CachePipeline({fits})" if fits else ""
    raise TypeError(f"pipeline: wanted a CachePipeline, got {shown(value)}{hint}")


def _window(window: int | None) -> int:
    """None stands for the policies' own until `__attrs_post_init__` has asked them."""
    return cast(int, window)


@named
@attrs.frozen(kw_only=True)
class CachePipeline:
    """What to write, what to read and what to drop, as one frozen value.

    `window` is the number of recent tokens, the current one included, that every head keeps; by
    default the one that a policy demands (`LocalAttention`, `DuoAttention`, a trained `WriteGate`),
    else the one that the eviction prefers (`SnapKV`: its observation), else 256. `backend` is
    "auto", "reference" or "triton". A pipeline holds no state: `init` makes a cache, and one
    pipeline may serve many of them.

    Example:
        `CachePipeline(admission=gate, selection=Quest(budget=1024), eviction=SnapKV(budget=4096))`
    """

    admission: Admission = attrs.field(factory=AdmitAll, validator=slot_field("admission"))
    selection: Selection = attrs.field(factory=SelectAll, validator=slot_field("selection"))
    eviction: Eviction = attrs.field(factory=KeepAll, validator=slot_field("eviction"))
    window: int = attrs.field(default=None, converter=_window, validator=optional(positive))
    backend: Backend = attrs.field(default="auto", validator=one_of(*BACKENDS))

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "window", self._resolve_window())
        for policy in (self.selection, self.eviction):
            policy.check_window(self.window)

    def _resolve_window(self) -> int:
        named = {
            "window": self.window,
            "admission": self.admission.window,
            "eviction": self.eviction.window,
        }
        given = {name: value for name, value in named.items() if value is not None}
        if len(set(given.values())) > 1:
            found = ", ".join(f"{name} says {value}" for name, value in given.items())
            others = {value for name, value in given.items() if name != "window"}
            hint = "leave window= out" if len(others) == 1 else "give all the same"
            raise ValueError(f"window: the parts of the pipeline disagree: {found}; {hint}")
        return next(iter(given.values()), self.eviction.prefers_window or DEFAULT_WINDOW)

    def init(self, spec: CacheSpec, batch: int = 1, exchange: Exchange | None = None) -> CacheState:
        """An empty cache for `batch` sequences; ValueError if a policy does not fit `spec`.

        `exchange` reaches the caches of the model's other heads, where `spec` has some of them.
        """
        check_int("batch", batch, 1)
        self.check(spec, exchange)
        return allocate(
            spec, batch, self._ops(spec), self.window, self.admission, self.selection,
            self.eviction, ALONE if exchange is None else exchange,
        )  # fmt: skip

    def dry(self, spec: CacheSpec, batch: int = 1) -> CacheState:
        """A cache with the sizes of `init`'s that takes no memory, for plans; checks as `init`."""
        check_int("batch", batch, 1)
        self.check(spec)
        return allocate(
            spec, batch, self._ops(spec), self.window, self.admission, self.selection,
            self.eviction, dry=True,
        )  # fmt: skip

    def _ops(self, spec: CacheSpec) -> Ops:
        """Of the one backend that runs on all devices of `spec`."""
        found = {resolve(self.backend, on): on for on in spec.devices or (spec.device,)}
        if len(found) > 1:
            said = ", ".join(f"{backend} on {on}" for backend, on in sorted(found.items()))
            raise BackendError(
                f"backend='auto': the layers' devices want several, {said}; choose 'reference'"
            )
        return load(next(iter(found)))

    @property
    def reads(self) -> frozenset[str]:
        """What policies want beside queries, keys and values.

        Of {"key_pre", "hidden", "query_pre"}, which `attend` takes, and {"output_weight", "rope"},
        which `tell` takes.
        """
        eviction = self.eviction
        asked = {
            "query_pre": eviction.query_stats,
            "hidden": eviction.hidden,
            "output_weight": eviction.output_weight,
            "rope": eviction.rope,
        }
        named = frozenset(name for name, wanted in asked.items() if wanted)
        return self.admission.needs | eviction.needs | named

    def check(self, spec: CacheSpec, exchange: Exchange | None = None) -> None:
        """Raises ValueError or UnsupportedError if a policy does not fit `spec`.

        Policies that look across heads need an `exchange` where `spec` has some heads only.
        """
        check_kind("spec", spec, CacheSpec, "a CacheSpec", _of_model(spec))
        if exchange is not None:
            check_kind("exchange", exchange, Exchange, "an Exchange")
        policies = self.admission, self.selection, self.eviction
        check_policies(*policies, spec, self.window, exchange)

    def begin(
        self,
        state: CacheState,
        lengths: Sequence[int],
        phase: Phase,
        valid: Tensor | None = None,
    ) -> None:
        """Opens a call that adds `lengths[b]` real tokens to each sequence.

        `phase` is "prompt" (queries read all that is visible) or "decode" (every query selects for
        itself). A decode call of several columns names its real tokens by `valid` `[B, T]`. Evicts
        if that is due or a cap asks for it, and reserves what decoding needs, so that capacity
        errors come before any layer writes.
        """
        check_state(state)
        check_call(state, lengths, phase, valid)
        self.maintain(state)
        with state.unbroken():
            open_call(state, tuple(lengths), phase, valid)

    def attend(
        self,
        state: CacheState,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_pre: Tensor | None = None,
        hidden: Tensor | None = None,
        query_pre: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """One layer of the open call: decides, writes, attends.

        Prompt calls are packed: `query` `[Hq, T, D]`, `key`, `value`, `key_pre` `[Hkv, T, D]`,
        `hidden` `[T, hidden]`, sequence after sequence, real tokens only; returns `[Hq, T, D]`.
        Decode calls are `[B, Hq, T, D]` and `[B, Hkv, T, D]`, `hidden` `[B, T, hidden]`; returns
        `[B, Hq, T, D]`, zeros where a token is not real. Keys are after RoPE at their true
        positions. `query_pre` are the queries before RoPE, for evictions that keep statistics of
        them. Values, and what is returned, have the layer's value channels. `sinks` `[Hq]`
        are logits that join every softmax and carry no value.
        """
        check_state(state)
        call = check_layer(state, layer)
        store = state.layers[layer]
        check_sinks(sinks, store.sizes.heads, store.device)
        store.sinks = sinks
        run = prompt if call.phase == "prompt" else decode
        out = run(state, call, store, query, key, value, key_pre, hidden, query_pre)
        call.done.add(layer)
        return out

    def tell(self, state: CacheState, layer: int, **known: Unpack[Known]) -> None:
        """Says of the model's layer what an eviction may ask for, before calls; forks know it too.

        `output_weight` `[Hq, Dv, hidden]` is the output projection, or a function that returns it,
        which is called whenever the layer is scored. `rope` says how queries and keys turn, None
        that they do not.
        """
        check_state(state)
        tell(state, layer, known)

    def attend_shared(
        self,
        state: CacheState,
        layer: int,
        query: Tensor,
        *,
        sinks: Tensor | None = None,
        last: Sequence[int] | None = None,
    ) -> Tensor:
        """Attention of another query over the keys and values of `layer`; nothing is written.

        For models in which layers share the keys of an earlier one, which ran in this call. `query`
        `[Hq, T, D]` or `[B, Hq, T, D]`, `sinks` and what is returned are as in `attend`. A
        selection chooses for each query by itself. In a prompt call, `last[b]` says that only so
        many of a sequence's last new tokens ask.
        """
        check_state(state)
        call = check_shared(state, layer, last)
        check_kind("query", query, Tensor, "a tensor [Hq, T, D] or [B, Hq, T, D]")
        store = state.layers[layer]
        heads = query.shape[0 if call.phase == "prompt" else 1]
        check_sinks(sinks, heads, store.device)
        if call.phase == "decode":
            return read_decoded(state, call, store, query, sinks)
        return read_prompt(state, call, store, query, sinks, None if last is None else tuple(last))

    def commit(self, state: CacheState, *, evict: bool = True) -> None:
        """Closes the call: lengths become current, and evictions that are due happen.

        After a decode call of several columns, or without `evict`, they wait for the next `begin`,
        so that refused candidates can be taken back by `crop`. One that a cap stops stays due as
        well.
        """
        check_state(state)
        check_flag("evict", evict)
        call = check_complete(state)
        close_call(state, call)
        if call.phase == "prompt":
            capacity.release(state)
            for row, added in zip(state.sequences, call.added, strict=True):
                row.prompt_open |= added > 0 and not self.eviction.neutral
        elif call.valid is None and evict:
            self.maintain(state)

    def abort(self, state: CacheState) -> None:
        """Forgets the open call; the cache is as it was before `begin`."""
        check_state(state)
        abort(state)

    def end_prompt(self, state: CacheState) -> None:
        """Says that the prompt is complete, so that prompt-end evictions act.

        Raises PhaseError while a call is in flight, or where an eviction wants a replay that has
        not been, and ValueError for scores with NaN, with the cache as it was.
        """
        check_state(state)
        if state.call is not None:
            raise PhaseError("end_prompt: a call is in flight; commit or abort it first")
        if state.pending_end:
            evict(state, [row.prompt_open for row in state.sequences])
            for row in state.sequences:
                row.prompt_open = False

    @contextmanager
    def replay(
        self, state: CacheState, *, span: range | None = None, sinks: int = 0
    ) -> Iterator[CacheState]:
        """A fork in which tokens look back at those of `state`, for evictions that are `replayed`.

        Run prompt calls in it: the weights that their queries give the tokens at positions `span`
        (default all) become numbers of `state`, under the eviction's `accumulates` and `group`,
        when the block ends without an error. Nothing else of `state` changes, and the fork is gone
        afterwards. A query's softmax runs over the span, the first `sinks` tokens and the tokens of
        the replay itself. Several replays of one cache add up.

        Example:
            `with pipeline.replay(state, span=range(0, 2048)) as fork: ...`

        Raises:
            PhaseError: a call is in flight, in the cache or, at the end, in the fork.
            UnsupportedError: no layer's eviction is `replayed`.
            ValueError: the span is no range of positions that a sequence holds.
        """
        check_state(state)
        check_int("sinks", sinks, 0)
        if state.call is not None:
            raise PhaseError("replay: a call is in flight; commit or abort it first")
        if not any(map(looks_back, state.layers)):
            raise UnsupportedError(
                f"replay: {type(self.eviction).__name__} does not look at replays; only evictions "
                "that say replayed=True do, such as KVzip"
            )
        longest = max(state.lengths)
        span = range(longest) if span is None else span
        if not isinstance(span, range) or span.step != 1 or not 0 <= span.start < span.stop:
            raise ValueError(f"span: wanted a range of positions, got {shown(span)}")
        if span.stop > longest:
            raise ValueError(f"span: wanted positions below {longest}, got {span}")
        fork = fork_to_replay(state, sinks, span)
        yield fork
        if fork.call is not None:
            raise PhaseError("replay: a call is in flight in the fork; commit or abort it first")
        adopt_numbers(state, fork)

    def maintain(self, state: CacheState) -> None:
        """Evicts for sequences that decoded another `interval` tokens, if the policy does."""
        due = self.due(state)
        if due:
            evict(state, due, decoding=True)

    def reserve(self, state: CacheState, steps: int) -> None:
        """Lets the next `steps` decode calls of one token run without reading the device.

        For loops that replay a captured step. Evicts first where the spec's `at_cap` says so.
        Raises CapacityError where no step fits, PhaseError while a call is in flight.
        """
        check_state(state)
        check_int("steps", steps, 1)
        if state.call is not None:
            raise PhaseError("reserve: a call is in flight; commit or abort it first")
        capacity.reserve(state, 1, steps)

    def activate(self, state: CacheState, active: Tensor) -> None:
        """Says which sequences, bool `[B]` on the device, store what decode calls bring.

        The host does not look: it learns of it when it next asks the device. So this can only take
        away; `CacheState.resume` makes sequences active.
        """
        state.devices.activate(active)

    def prepare_replay(self, state: CacheState, most: int) -> bool:
        """Makes a captured decode step of one token ready to run; up to `most` will follow.

        Returns whether the host looked at the device.
        """
        full, spent = moments.is_full(state, (1,) * state.batch), state.steps_reserved < 1
        if full:
            state.sync_host()
            moments.settle(state)
        if spent:
            state.sync_host()  # caps ask how long each row is
            capacity.reserve_long(state, most)
        return full or spent

    def replayed(self, state: CacheState, *, evict: bool = True) -> bool:
        """A captured decode step ran: what commit does on the host, and evictions that are due.

        The device's part is in the graph. Rows that ended meanwhile are counted as if they went on
        until the host asks the device. Returns whether it did. Without `evict`, evictions are left
        to `maintain`.
        """
        for row in state.sequences:
            row.length += row.active
        state.steps_reserved -= 1
        due = evict and bool(self.due(state))
        if due:
            state.sync_host()  # rows that ended meanwhile are not due
            self.maintain(state)
        return due

    def due(self, state: CacheState) -> list[bool]:
        """The sequences for which `maintain` would evict now; empty if there is none."""
        check_state(state)
        if self.eviction.when != "decode" or self.eviction.neutral:
            return []
        interval = state.spec.interval
        rows = [
            row.active
            and not row.prompt_open
            and row.length // interval > row.considered_at // interval
            for row in state.sequences
        ]
        return rows if any(rows) else []

    def report(self, state: CacheState) -> Report:
        """What took effect and what it costs in bytes."""
        check_state(state)
        return report(state)
