"""The library's cache as a transformers Cache."""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Unpack

import attrs
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..._arguments import check_flag, check_path, check_rows, optional, rows_below
from ..._fields import MOST, check_int
from ...errors import PhaseError, RollbackError, UnsupportedError
from ...pipeline import CachePipeline, is_pipeline
from ...spec import Sizes, check_sizes
from ...store import CacheState, Report, save
from ...store.fork import adopt, select_rows
from ...store.report_ranks import joined
from ...store.rollback import crop
from .asked import known_of
from .columns import Chunks, append, gaps, pick, real, take_back, to_tensors
from .faces import KVRef, ValueRef, faces_of, keeps_state
from .fingerprints import model_fingerprint
from .layout import Columns
from .models import Served, ranks_of, served
from .modes import exactly, in_dtype, ordinary
from .moved import of_rows
from .picked import indexed
from .rank_files import part_of, write_index
from .recurrent import States
from .sizes import spec_from


class KVPolicyCache(Cache):
    """A pipeline's cache for `model.generate` and `model(...)`, used inside `attach`.

    Made by `new_cache`, whose arguments it takes; `known` is what was found out of the model
    already. `columns` counts the token columns that went through, padding and evicted
    tokens included, as transformers wants it. A bare loop names the phase: forwards are the prompt
    until `end_prompt()`, and decode from then on until `begin_prompt()`.
    """

    def __init__(
        self,
        model: nn.Module,
        pipeline: CachePipeline,
        *,
        dtype: torch.dtype | None = None,
        known: Served | None = None,
        **sizes: Unpack[Sizes],
    ) -> None:
        check_sizes(sizes)
        self.served = served(model) if known is None else known
        self.dtype, self.spec = dtype, spec_from(self.served, dtype=dtype, **sizes)
        self.pipeline, self.sizes, self.model = pipeline, sizes, weakref.ref(model)
        self.ranks = ranks_of(self.served)
        self.needs = pipeline.reads
        self.told = known_of(model, self.served, self.needs)
        self.failure: BaseException | None = None  # of a layer, until all ranks know of it
        self.state: CacheState | None = None
        self.phase = "prompt"
        self.boundary: int | None = None  # column where the prompt that `generate` announced ends
        self.chunks: Chunks = []
        self.layout: Columns | None = None  # of the forward in flight
        self.before: Any = None  # states before the forward in flight
        self.evicts = True  # whether the end of the prompt does
        self.singles = 0  # forwards of one column in a row, in a prompt that goes on
        self.counts_positions = False  # whether the real tokens seen give position ids
        self.counts_own = False  # then from where the model itself begins, not from 0
        self.counted_from: int | None = None  # where forwards of a bare loop began to count places
        self.moved: list[Any] | None = None  # what images moved, of those who count positions
        self.counts_columns = False  # whether all columns seen do, as with soft prompts
        self.recording = False  # columns may be taken back before the next forward
        self.pieces: Any = None  # CapturedForward that is being made, around its layers' attention
        self.graph: Any = None  # CapturedStep of this cache's buffers
        self.captures = 0
        self.capturing = False
        self.packed: list[int] | None = None  # tokens of each sequence in a row that packs them
        self.decoding = "not yet"  # how the last generate decoded: "captured" or "eager: reason"
        self._make_faces()

    def _make_faces(self) -> None:
        """Layers as transformers sees them, and the states that its own ones keep."""
        faces = faces_of(self, self.served.config, self.served.places)
        Cache.__init__(self, layers=faces)
        own = {n: x for n, x in enumerate(faces) if keeps_state(x)}
        self.states = States(own, self.served.probe)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Handles in place of both, with which our attention stores them."""
        # A number of a layer in a graph would be that layer's alone; the module knows it as well.
        place = None if torch.compiler.is_compiling() else layer_idx
        handle = KVRef(self, place, key_states, value_states)
        return handle, ValueRef(handle)

    def hold(self, layer: int, key: Tensor, value: Tensor) -> KVRef:
        """The handle of our `layer`."""
        return KVRef(self, self.served.layers[layer].place, key, value)

    @ordinary
    def attend(
        self,
        handle: KVRef,
        query: Tensor,
        pre: Tensor | None,
        query_pre: Tensor | None,
        hidden: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention `[B, S, Hq, D]` of one layer of the forward in flight; stores its tokens.

        `query` and the handle's keys and values are `[B, H, S, D]`, as are `pre` and `query_pre`;
        `hidden` `[B, S, hidden]`, `sinks` `[Hq]`. Computes in the cache's dtype and
        answers in the query's.
        """
        if self.layout is None or self.state is None:
            raise PhaseError(
                "attention outside a forward of the attached model's decoder, or in one inside "
                "which another ran and took it back; call the model before or after it"
            )
        if self.pieces is not None:
            found: Tensor = self.pieces.cut(handle, query, pre, query_pre, hidden, sinks)
            return found
        if torch.is_autocast_enabled(query.device.type):
            with exactly(query.device):
                return self.attend(handle, query, pre, query_pre, hidden, sinks)
        if not self.ranks.many:
            return self._attend(handle, query, pre, query_pre, hidden, sinks)
        if self.failure is None:
            try:
                return self._attend(handle, query, pre, query_pre, hidden, sinks)
            except BaseException as error:  # raised on all ranks when the forward closes
                self.failure = error
        # The other ranks wait for this layer.
        return query.new_zeros(*query.transpose(1, 2).shape[:3], handle.value.shape[3])

    def _attend(
        self,
        handle: KVRef,
        query: Tensor,
        pre: Tensor | None,
        query_pre: Tensor | None,
        hidden: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        assert self.layout is not None and self.state is not None
        pipeline, state, layer = self.pipeline, self.state, handle.layer
        q = self._own(query, "query")
        # Layers that share keys may lie elsewhere; others are asked where they lie.
        device = state.layers[layer].device if handle.wrote else query.device
        sinks = None if sinks is None else sinks.detach().to(device)
        hidden = None if hidden is None else hidden.to(device)
        if handle.wrote:
            out = self.layout.attend_shared(pipeline, state, layer, q.to(device), sinks)
        else:
            k, v = self._own(handle.key, "key"), self._own(handle.value, "value")
            if pre is not None:  # a layer without RoPE has them anyway
                pre = self._own(pre, "key_pre") if "key_pre" in self.needs else None
            if query_pre is not None:
                wanted = "query_pre" in self.needs
                query_pre = self._own(query_pre, "query_pre") if wanted else None
            if state.call is not None and layer in state.call.done:
                raise UnsupportedError(
                    f"layers: [{layer}] of the attached model ran twice in this forward: one was "
                    "put in another's place; detach, change the model, attach again"
                )
            out = self.layout.attend(pipeline, state, layer, q, k, v, pre, query_pre, hidden, sinks)
            handle.wrote = True
        if out.dtype != query.dtype or out.device != query.device:
            out = out.to(query.device, query.dtype)
        return out.transpose(1, 2).contiguous()

    def _own(self, x: Tensor, name: str) -> Tensor:
        """`x` in the cache's dtype, where nothing is lost or the caller chose the dtype."""
        if x.dtype == self.spec.dtype:
            return x
        return in_dtype(x, name, self.spec.dtype, chosen=self.dtype is not None)

    @property
    def columns(self) -> int:
        """Token columns that went through, padding and evicted tokens included."""
        return sum(n for n, _ in self.chunks)

    @ordinary
    def ensure_state(self, batch: int) -> CacheState:
        """The state, made for `batch` sequences by the first forward."""
        if self.state is None or (not self.chunks and self.state.batch != batch):
            self.take_state(self.pipeline.init(self.spec, batch, self.ranks.exchange))
        assert self.state is not None
        self.check_batch(batch)
        return self.state

    def check_batch(self, batch: int) -> None:
        """Raises ValueError for another number of sequences than the cache holds."""
        if self.state is not None and self.state.batch != batch:
            raise ValueError(
                f"input_ids: the cache holds {self.state.batch} sequences, got a batch of {batch}"
            )

    def take_state(self, state: CacheState) -> None:
        """Makes a new state this cache's; evictions in it are told what they ask of the model."""
        self.state, self.graph = state, None
        for layer, known in self.told.items():
            self.pipeline.tell(state, layer, **known)

    def counted(self) -> Any:
        """The columns so far, for attention that counts them: while a graph is captured on the
        device, where every replay finds them anew.
        """
        if not self.capturing:
            return self.columns
        assert self.state is not None
        return self.state.on(self.state.layers[0]).lengths.max()

    def saw(self, columns: int, valid: Tensor | None) -> None:
        """Records the columns of a finished call; `valid` `[B, columns]` on the host."""
        self.chunks = append(self.chunks, columns, valid)

    @property
    def gapped(self) -> list[bool]:
        """Sequences that saw a column which is no token after one which is."""
        return gaps(self.chunks, 0 if self.state is None else self.state.batch)

    def forget_columns(self, count: int) -> None:
        """Uncounts trailing columns that stored nothing."""
        size, valid = self.chunks[-1]
        assert valid is None and size >= count
        self.chunks[-1] = (size - count, None)

    def ended(self, columns: int, stored: Sequence[int]) -> None:
        """Says how many of the last `columns`, so far taken as real, each sequence stored."""
        if any(n < columns for n in stored):
            self.forget_columns(columns)
            self.saw(columns, torch.arange(columns) < torch.tensor(stored)[:, None])

    @ordinary
    def begin_prompt(self, boundary: int | None = None) -> None:
        """Says that the next columns are a prompt (or turn), up to column `boundary` if given."""
        optional(check_int, "boundary", boundary, 0)
        self.phase, self.boundary, self.recording = "prompt", boundary, False
        self.counts_positions, self.counts_own, self.evicts = False, False, True
        if self.state is not None:
            self.state.resume()

    @ordinary
    def end_prompt(self) -> None:
        """Says that the prompt is complete: prompt-end evictions act, and decoding begins."""
        self.phase, self.boundary = "decode", None
        if self.state is None:
            return
        if not self.evicts:
            for row in self.state.sequences:
                row.prompt_open = False
        with self.ranks.together():
            self.pipeline.end_prompt(self.state)

    def begin_question(self, boundary: int | None) -> None:
        """Says that the next columns ask about what the cache holds, without another eviction.

        Up to column `boundary` they are a prompt, which reads all that is left; without one they
        are decoded tokens, which select.
        """
        self.begin_prompt(boundary)
        if boundary is None:
            self.phase = "decode"
        else:
            self.evicts = False

    def real(self) -> Tensor:
        """Which of the columns so far are real tokens, bool `[B, columns]` on the host."""
        return real(self.chunks, 0 if self.state is None else self.state.batch)

    def report(self, *, all_ranks: bool = False) -> Report:
        """What took effect and what it costs in bytes.

        Of this rank's heads where ranks share the model; with `all_ranks` of all heads, for which
        every rank has to call.
        """
        check_flag("all_ranks", all_ranks)
        if not all_ranks or not self.ranks.many:
            return self._report()
        with self.ranks.together():
            own = self._report()
        return joined(self.ranks.objects(own))

    def _report(self) -> Report:
        if self.state is None:
            raise PhaseError("report: nothing went through this cache yet")
        return attrs.evolve(self.pipeline.report(self.state), states=self.states.nbytes)

    @ordinary
    def fork(self, rows: Sequence[int] | None = None) -> KVPolicyCache:
        """A cache that goes its own way; full pages are shared until either gives them up."""
        optional(check_rows, "rows", rows)
        rows = range(self.state.batch if self.state else 0) if rows is None else rows
        with self.ranks.together():
            state = None if self.state is None else select_rows(self.state, list(rows))
        return self.around(state, rows)

    def around(self, state: CacheState | None, rows: Sequence[int]) -> KVPolicyCache:
        """A cache of `state`, a fork of this one's with its sequences `rows`."""
        new = object.__new__(KVPolicyCache)
        new.__dict__.update(self.__dict__)
        new._make_faces()
        new.state = state
        new.states.restore(self.states.select(list(rows)))
        new.chunks = pick(self.chunks, list(rows))
        if self.state is not None:
            new.moved = of_rows(self.moved, list(rows), self.state.batch)
        new.graph, new.captures = None, 0
        # Of a generate in progress, whose own forwards go on with the cache that it was given.
        new.counts_positions = new.counts_own = new.counts_columns = False
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> KVPolicyCache:
        return self.fork()

    def __iter__(self) -> NoReturn:
        raise UnsupportedError(
            "iteration: heads hold different tokens, in pages; "
            "cache.state.kept(layer, sequence, head) tells which"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "copy: pages belong to one cache; cache.fork() copies it, cache.save(path) files it"
        )

    @property
    def is_initialized(self) -> bool:
        """Whether anything went through."""
        return bool(self.chunks)

    @ordinary
    def crop(self, tokens: Any) -> None:
        """Takes back columns: `-n` of them, or down to `n` in all, as transformers has both.

        Raises RollbackError, with nothing changed, for more than the cache can take back.
        """
        whole = isinstance(tokens, Tensor) and tokens.numel() == 1  # transformers gives these
        n = int(tokens) if whole else tokens
        check_int("tokens", n, -MOST)
        drop = -n if n <= 0 else max(self.columns - n, 0)
        if drop == 0 or self.state is None:
            return
        self.states.refuse_crop()
        if drop > self.columns:
            raise RollbackError(
                f"crop: the cache has seen {self.columns} columns, cannot drop {drop}"
            )
        chunks, counts = take_back(self.chunks, drop, self.state.batch)
        with self.ranks.together():
            crop(self.state, counts)
        self.chunks = chunks

    @ordinary
    def restore(self, before: KVPolicyCache) -> None:
        """Goes back to what `fork` gave, in place; `before` is spent."""
        self.chunks, self.phase, self.boundary = before.chunks, before.phase, before.boundary
        if before.state is None:
            self.state = self.graph = None
        else:
            assert self.state is not None
            adopt(self.state, before.state)
        self.states.restore(before.states.snapshot())

    @ordinary
    def reset(self) -> None:
        """Empties the cache and gives its pages back."""
        self.chunks, self.phase, self.boundary, self.recording = [], "prompt", None, False
        self.counted_from = self.moved = None
        self.states.reset()
        if self.state is not None:
            self.state.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a safetensors file, for `load_cache`; only pages in use are written.

        Where ranks share the model, every one calls: it writes a file of its heads beside `path`,
        which names them. Raises PhaseError before the first forward, during one, and when the model
        is gone.
        """
        check_path("path", path)
        target = Path(path)
        if not self.ranks.many:
            self._save(target)
            return
        key = self.ranks.objects(uuid.uuid4().hex[:16])[0]
        own = part_of(target, key, self.ranks.part, self.ranks.parts)
        try:
            with self.ranks.together():
                self._save(own)
        except BaseException:
            own.unlink(missing_ok=True)
            raise
        with self.ranks.together():
            if self.ranks.part == 0:
                write_index(target, key, self.ranks.parts)

    def _save(self, path: Path) -> None:
        model = self.model()
        if self.state is None or model is None:
            what = "its model is gone" if model is None else "nothing went through this cache yet"
            raise PhaseError(f"save: {what}")
        save(
            self.state,
            path,
            self.pipeline,
            fingerprint=model_fingerprint(model),
            extra=to_tensors(self.chunks, self.state.batch) | self.states.to_tensors(),
            notes={"phase": self.phase},
        )

    def _select(self, rows: list[int]) -> None:
        assert self.state is not None
        with self.ranks.together():
            chosen = select_rows(self.state, rows)
        self.moved = of_rows(self.moved, rows, self.state.batch)
        adopt(self.state, chosen)
        self.states.restore(self.states.select(rows))
        self.chunks = pick(self.chunks, rows)

    @ordinary
    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.state is not None:
            self._select(rows_below("beam_idx", beam_idx, self.state.batch))

    @ordinary
    def batch_select_indices(self, indices: Any) -> None:
        """Keeps sequences: numbers of them, of which -1 is a new, empty one, a mask or a slice."""
        if self.state is not None:
            self._select(indexed(indices, self.state.batch))

    @ordinary
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch).repeat_interleave(repeats)
            self._select(rows.tolist())

    def offload(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError("offload: pages stay on the model's device; cache.save files them")

    def prefetch(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError("prefetch: pages are on the model's device, none is elsewhere")

    def activate_past_recording(self, *args: Any, **kwargs: Any) -> None:
        """Assisted decoding begins: evictions wait until rejected candidates are taken back."""
        self.recording = True


def new_cache(
    model: nn.Module,
    pipeline: CachePipeline,
    *,
    dtype: torch.dtype | None = None,
    **sizes: Unpack[Sizes],
) -> KVPolicyCache:
    """An empty cache for `model`, in its own or another `dtype`; `sizes`: those of `Sizes`."""
    is_pipeline(pipeline)
    return KVPolicyCache(model, pipeline, dtype=dtype, **sizes)
