"""One decode step as a CUDA graph: captured once for a cache, replayed for every token."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ...errors import KVPolicyError
from .cache import KVPolicyCache
from .columns import take_back
from .compile import PLACE
from .held_fast import HOOKED, HeldFast, hooks_of, others_in
from .own_steps import OwnSteps
from .wrappers import takes_positions

AHEAD = 1 << 16  # tokens that buffers are made for at most before they come
WARM_UP = 2  # eager steps before capture: kernels compile, workspaces are allocated
ONE_CAPTURE = threading.Lock()  # of captures in this process


def why_not(
    model: Any, cache: KVPolicyCache, records: Collection[str] = (), room: float = 0
) -> str | None:
    """Why decoding cannot be captured, or None if it can; `records` is what `forward` shall hand
    on beside logits, `room` how many tokens are decoded.
    """
    state = cache.state
    assert state is not None
    if records:
        return f"{' and '.join(records)} are wanted of every step"
    if state.spec.device.type != "cuda":
        return f"the model is on {state.spec.device}; only CUDA devices capture"
    if state.ops.backend != "triton":
        return f"the {state.ops.backend} backend synchronises with the host"
    if not takes_positions(model):
        return "its decoder counts positions on the host, which a graph would hold fast"
    probe = cache.served.probe
    compiled = any(hasattr(module, PLACE) for module in cache.served.modules)
    alike = all(n == cache.columns for n in state.lengths)
    if probe.counts and cache.columns + room >= probe.counts_from and (compiled or not alike):
        return (
            f"its attention counts columns on the host ({probe.counts}), which shows from "
            f"{probe.counts_from} columns on and a graph would hold fast"
        )
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        return f"the model is spread over {len(devices)} devices"
    return None


class CapturedStep:
    """The graph of `tokens [B, 1], positions [B, 1] -> logits [B, 1, V]` on one cache's buffers."""

    def __init__(self, model: Any, cache: KVPolicyCache, tokens: Tensor, positions: Tensor) -> None:
        state = cache.state
        assert state is not None
        self.model = model
        self.tokens, self.positions = tokens.clone(), positions.clone()
        self.generation, self.held = state.generation, HeldFast(model)
        self.graph = torch.cuda.CUDAGraph()
        cache.capturing = True
        try:
            # What other threads do on the device neither breaks a capture nor is broken by one,
            # but for a second one. Capturing runs the host's bookkeeping once although nothing is
            # computed.
            with (
                ONE_CAPTURE,
                cache.ranks.capturing(),
                state.rehearsal(),
                torch.cuda.graph(self.graph, capture_error_mode="thread_local"),
            ):
                self.logits = run(model, cache, self.tokens, self.positions)
        finally:
            cache.capturing = False

    def replay(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of one step; the tensor is overwritten by the next one."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.logits


def forward(
    model: Any, cache: KVPolicyCache, tokens: Tensor, positions: Tensor,
    records: Mapping[str, Any] = MappingProxyType({}),
) -> Any:  # fmt: skip
    """The model's output of one eager step, with what `records` names, as its values ask."""
    return model(
        input_ids=tokens,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        return_dict=True,
        **{f"output_{name}": asked for name, asked in records.items()},
    )


def run(model: Any, cache: KVPolicyCache, tokens: Tensor, positions: Tensor) -> Tensor:
    """Logits `[B, 1, V]` of one eager step."""
    logits: Tensor = forward(model, cache, tokens, positions).logits
    return logits


def capture_failure(error: BaseException) -> str:
    """Where a capture met what cannot be captured: the model's line, and what CUDA says of it."""
    while error.__context__ is not None:  # ending a failed capture fails once more
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)
    others = (str(Path(torch.__file__).parent), str(Path(__file__).resolve().parents[2]))
    found = [f for f in frames if not f.filename.startswith(others)] or list(frames)
    place = f"{Path(found[-1].filename).name}:{found[-1].lineno}" if found else "its end"
    return f"at {place}: {str(error).splitlines()[0]}"


class Stepper:
    """Feeds one token after another, by a graph where that is possible.

    `cache.decoding` says which: "captured", or "eager" with the reason. `records` names what
    `output`, the last step's, holds beside logits; `own` prepares steps that the model itself must.
    `room` is how many tokens come, infinite where nobody knows; beyond AHEAD, `make_room` in time.
    """

    def __init__(
        self,
        model: Any,
        cache: KVPolicyCache,
        position: Tensor,
        room: float,
        records: Mapping[str, Any] = MappingProxyType({}),
        own: OwnSteps | None = None,
    ) -> None:
        state = cache.state
        assert state is not None
        self.model, self.cache, self.position = model, cache, position
        self.records, self.own = records, own
        self.output: Any = None
        self.began = list(state.lengths), cache.columns
        self.reason = own.reason if own else why_not(model, cache, records, room)
        if cache.graph is not None and not cache.graph.held.still():
            cache.graph = None
        if self.reason is None and cache.graph is None and others_in(hooks_of(model)):
            self.reason = HOOKED
        self._agree()
        self.captured = self.reason is None
        cache.decoding = "captured" if self.captured else f"eager: {self.reason}"
        self.eager_steps = 0
        self.make_room(room)

    def make_room(self, tokens: float) -> None:
        """Page tables for as many more `tokens` as `room` says then; all ranks call it together."""
        state = self.cache.state
        assert state is not None
        self.room = int(min(tokens, AHEAD))
        state.widen(max(state.lengths) + self.room)
        self.looked = True  # at the device, as all ranks do at the same steps

    def _agree(self) -> None:
        """Ranks that share the model capture all or none, and none replays what another lost."""
        told = self.cache.ranks.numbers([self.reason is not None, self.cache.graph is None])
        eager, lost = (any(column) for column in zip(*told, strict=True))
        if lost:
            self.cache.graph = None
        if eager and self.reason is None:
            self.reason = "another rank cannot capture"

    def step(self, token: Tensor, active: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits `[B, 1, V]` after feeding `token` `[B]`; rows not `active` `[B]` store nothing.

        `ids` `[B, columns]` are all so far, with `token` the last of them, which only steps
        that the model prepares read.
        """
        if not self.captured:
            state = self.cache.state
            assert state is not None
            rows = active.tolist()
            if rows != state.active:
                state.finish([row for row, on in enumerate(rows) if not on])
            at = token[:, None], self.position
            if self.own:
                assert ids is not None
                self.output = self.own.forward(ids, self.records)
            else:
                self.output = forward(self.model, self.cache, *at, self.records)
            logits: Tensor = self.output.logits
        else:
            logits = self._captured(token[:, None], active)
        self.position = self.position + 1
        self.room = max(self.room - 1, 0)
        return logits

    def _captured(self, tokens: Tensor, active: Tensor) -> Tensor:
        cache, state = self.cache, self.cache.state
        assert state is not None
        cache.pipeline.activate(state, active)
        if self.eager_steps < WARM_UP and cache.graph is None:
            self.eager_steps += 1
            return run(self.model, cache, tokens, self.position)
        with cache.ranks.voting():
            self.looked |= cache.pipeline.prepare_replay(state, self.room)
            if self._stale():
                self._capture(tokens)
        if not self.captured:
            cache.ranks.stepping = False
            return run(self.model, cache, tokens, self.position)
        cache.ranks.stay()
        logits: Tensor = cache.graph.replay(tokens, self.position)
        cache.saw(1, None)  # before an eviction, which may fail when the token is in
        with cache.ranks.voting():
            self.looked = cache.pipeline.replayed(state, evict=not cache.recording)
        return logits

    def _stale(self) -> bool:
        """Whether a step must be captured, on all ranks if on one.

        They can ask each other only where all look at the device, which is where buffers move.
        """
        graph, ranks = self.cache.graph, self.cache.ranks
        assert self.cache.state is not None
        stale = graph is None or graph.generation != self.cache.state.generation
        if self.looked:
            return any(part[0] for part in ranks.numbers([stale]))
        if stale and ranks.many:
            ranks.stepping = True
            raise KVPolicyError(
                "the cache's buffers moved between two steps of a captured decoding that ranks "
                "share; use no cache that shares pages with this one while it decodes"
            )
        return stale

    def _capture(self, tokens: Tensor) -> None:
        """Captures the step; all ranks stay eager where one cannot."""
        cache, failed = self.cache, None
        cache.graph = None
        try:
            cache.graph = CapturedStep(self.model, cache, tokens, self.position)
        except RuntimeError as error:
            if isinstance(error, KVPolicyError | torch.OutOfMemoryError):
                raise
            failed = capture_failure(error)
        told = cache.ranks.numbers([failed is not None])
        if any(part[0] for part in told):
            cache.graph = None
            self._stay_eager(f"the capture failed {failed or 'on another rank'}")
        else:
            cache.captures += 1

    def _stay_eager(self, reason: str) -> None:
        """From now on steps run eagerly; the host learns how far they came."""
        assert self.cache.state is not None
        self.captured, self.cache.decoding = False, f"eager: {reason}"
        self.cache.state.sync_host()
        self._settle()

    def _settle(self) -> None:
        """Says which rows stored the columns so far, now that the host knows."""
        cache, state = self.cache, self.cache.state
        assert state is not None
        lengths, columns = self.began
        stored = [now - then for now, then in zip(state.lengths, lengths, strict=True)]
        cache.ended(cache.columns - columns, stored)
        self.began = list(state.lengths), cache.columns

    def finish(self, extra: int) -> None:
        """Called once when decoding has ended; its last `extra` columns stored nothing.

        The host learns which rows ended when.
        """
        cache, state = self.cache, self.cache.state
        cache.ranks.stepping = False
        if state is None:
            return
        if self.captured:
            state.sync_host()
            if extra:
                cache.forget_columns(extra)
            self._settle()
        elif extra:
            cache.chunks = take_back(cache.chunks, extra, state.batch)[0]
