"""The library's cache as a transformers Cache."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ...errors import PhaseError, RollbackError
from ...pipeline import CachePipeline, is_pipeline
from ...spec import Sizes
from ...store import CacheState, Report
from ...store.fork import adopt, select_rows
from ...store.rollback import crop
from .columns import Chunks, append, pick, take_back
from .plan import Plan
from .spec import spec_of

NAME = "kvpolicy"


class KVRef:
    """What `update` returns for keys and values: a handle that only our attention understands."""

    def __init__(self, cache: KVPolicyCache, key: Tensor, value: Tensor) -> None:
        self.cache, self.key, self.value = cache, key, value

    @property
    def shape(self) -> Any:
        raise PhaseError(
            f"a KVPolicyCache needs the attention implementation {NAME!r}: run inside "
            "attach(model, pipeline)"
        )


class KVPolicyLayer(CacheLayerMixin):
    """One layer's face towards transformers; everything is in the cache's state."""

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: KVPolicyCache, index: int) -> None:
        super().__init__()
        # Weak: a cycle would keep a dropped cache's pages until the collector happens to run.
        self._cache, self.index = weakref.ref(cache), index
        self.is_initialized = True

    @property
    def cache(self) -> KVPolicyCache:
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The state is made by the model's first forward."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        return self.cache.update(key_states, value_states, self.index)

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def offload(self) -> None:
        """Nothing: pages stay where they are."""

    prefetch = offload


class KVPolicyCache(Cache):
    """A pipeline's cache for `model.generate` and `model(...)`, used inside `attach`.

    Made by `new_cache`. `columns` counts the token columns that went through, padding and evicted
    tokens included, as transformers wants it. A bare loop names the phase: forwards are the prompt
    until `end_prompt()`, and decode from then on until `begin_prompt()`.
    """

    def __init__(self, model: nn.Module, pipeline: CachePipeline, **sizes: Unpack[Sizes]) -> None:
        self.spec = spec_of(model, **sizes)
        self.pipeline, self.sizes, self.model = pipeline, sizes, weakref.ref(model)
        self.state: CacheState | None = None
        self.phase = "prompt"
        self.boundary: int | None = None  # column where the prompt that `generate` announced ends
        self.chunks: Chunks = []
        self.plan: Plan | None = None  # of the forward in flight
        self.counts_positions = False  # whether the real tokens seen give position ids
        self.recording = False  # columns may be taken back before the next forward
        self.graph: Any = None  # CapturedStep of this cache's buffers
        self.captures = 0
        self.capturing = False
        self.decoding = "not yet"  # how the last generate decoded: "captured" or "eager: reason"
        super().__init__(layers=[KVPolicyLayer(self, i) for i in range(self.spec.layers)])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """A handle in place of both, the same for all layers; our attention stores them."""
        ref = KVRef(self, key_states, value_states)
        return ref, ref

    @property
    def columns(self) -> int:
        return sum(n for n, _ in self.chunks)

    def ensure_state(self, batch: int) -> CacheState:
        """The state, made for `batch` sequences by the first forward."""
        if self.state is None or (not self.chunks and self.state.batch != batch):
            self.state, self.graph = self.pipeline.init(self.spec, batch), None
        if self.state.batch != batch:
            raise ValueError(
                f"input_ids: the cache holds {self.state.batch} sequences, got a batch of {batch}"
            )
        return self.state

    def saw(self, columns: int, valid: Tensor | None) -> None:
        """Records the columns of a finished call; `valid` `[B, columns]` on the host."""
        self.chunks = append(self.chunks, columns, valid)

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

    def begin_prompt(self, boundary: int | None = None) -> None:
        """Says that the next columns are a prompt (or turn), up to column `boundary` if given."""
        self.phase, self.boundary, self.recording = "prompt", boundary, False
        self.counts_positions = False
        if self.state is not None:
            self.state.resume()

    def end_prompt(self) -> None:
        """Says that the prompt is complete: prompt-end evictions act, and decoding begins."""
        self.phase, self.boundary = "decode", None
        if self.state is not None:
            self.pipeline.end_prompt(self.state)

    def report(self) -> Report:
        """What took effect and what it costs in bytes."""
        if self.state is None:
            raise PhaseError("report: nothing went through this cache yet")
        return self.pipeline.report(self.state)

    def fork(self, rows: Sequence[int] | None = None) -> KVPolicyCache:
        """A cache that goes its own way; full pages are shared until either gives them up."""
        new = object.__new__(KVPolicyCache)
        new.__dict__.update(self.__dict__)
        Cache.__init__(new, layers=[KVPolicyLayer(new, i) for i in range(self.spec.layers)])
        rows = range(self.state.batch if self.state else 0) if rows is None else rows
        new.state = None if self.state is None else select_rows(self.state, list(rows))
        new.chunks = pick(self.chunks, list(rows))
        new.graph, new.captures = None, 0
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> KVPolicyCache:
        return self.fork()

    def crop(self, tokens: Any) -> None:
        """Takes back columns: `-n` of them, or down to `n` in all, as transformers has both."""
        n = int(tokens)
        drop = -n if n <= 0 else max(self.columns - n, 0)
        if drop == 0 or self.state is None:
            return
        if drop > self.columns:
            raise RollbackError(
                f"crop: the cache has seen {self.columns} columns, cannot drop {drop}"
            )
        chunks, counts = take_back(self.chunks, drop, self.state.batch)
        crop(self.state, counts)
        self.chunks = chunks

    def restore(self, before: KVPolicyCache) -> None:
        """Goes back to what `fork` gave, in place; `before` is spent."""
        self.chunks, self.phase, self.boundary = before.chunks, before.phase, before.boundary
        if before.state is None:
            self.state = self.graph = None
        else:
            assert self.state is not None
            adopt(self.state, before.state)

    def reset(self) -> None:
        """Empties the cache and gives its pages back."""
        self.chunks, self.phase, self.boundary, self.recording = [], "prompt", None, False
        if self.state is not None:
            self.state.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to a safetensors file, for `load_cache`; only pages in use are written.

        Raises PhaseError before the first forward and during one.
        """
        from .persist import save_cache

        save_cache(self, path)

    def _select(self, rows: Tensor) -> None:
        picked = [int(r) for r in rows.tolist()]
        if self.state is not None:
            adopt(self.state, select_rows(self.state, picked))
        self.chunks = pick(self.chunks, picked)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = 0 if self.state is None else self.state.batch
        self._select(torch.arange(batch).repeat_interleave(repeats))

    def activate_past_recording(self, *args: Any, **kwargs: Any) -> None:
        """Assisted decoding begins: evictions wait until rejected candidates are taken back."""
        self.recording = True


def new_cache(model: nn.Module, pipeline: CachePipeline, **sizes: Unpack[Sizes]) -> KVPolicyCache:
    """An empty cache for `model`; `sizes`: those of CacheSpec that `Sizes` names."""
    is_pipeline(pipeline)
    return KVPolicyCache(model, pipeline, **sizes)
