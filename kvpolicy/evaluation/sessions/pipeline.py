"""A pipeline's cache as a session that `score` can ask."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.hf import KVPolicyCache, new_cache
from ...pipeline import CachePipeline
from ...store import CacheState, Report


def settled(cache: KVPolicyCache) -> Report:
    """A cache's report after its pools gave back what forks that are gone had used."""
    assert cache.state is not None
    cache.state.trim()
    return cache.report()


class PipelineSession:
    """One sequence in a pipeline's cache; works inside `attach(model, pipeline)`.

    Example:
        `with attach(model, pipeline): score(lambda: PipelineSession(model, pipeline), examples)`
    """

    def __init__(self, model: PreTrainedModel, pipeline: CachePipeline) -> None:
        self._model = model
        self._cache: KVPolicyCache = new_cache(model, pipeline)

    @property
    def state(self) -> CacheState:
        """What the cache holds.

        Raises:
            ValueError: nothing went through it yet.
        """
        if self._cache.state is None:
            raise ValueError("state: nothing went through this session yet")
        return self._cache.state

    def prefill(self, ids: Tensor) -> Tensor:
        """Append prompt tokens `[T]`; logits `[vocabulary]` after the last of them."""
        if self._cache.phase != "prompt":
            self._cache.begin_prompt()
        return self._run(ids, logits_to_keep=1)[-1]

    def end_prompt(self) -> None:
        """The prompt is complete: prompt-end evictions act."""
        self._cache.end_prompt()

    def step(self, ids: Tensor) -> Tensor:
        """Append generated tokens `[T]`; logits `[T, vocabulary]`."""
        return self._run(ids, logits_to_keep=0)

    def fork(self) -> PipelineSession:
        """A copy that goes on by itself and shares full pages."""
        twin = object.__new__(PipelineSession)
        twin._model, twin._cache = self._model, self._cache.fork()
        return twin

    def report(self) -> Report:
        """What took effect and what it costs in bytes, forks that are alive included."""
        return self._cache.report()

    def held_bytes(self) -> int:
        """All bytes of the cache, after giving back what forks that are gone had used."""
        return settled(self._cache).total

    def tokens_read(self) -> float:
        """Tokens per head that the last decoded token read."""
        return self.report().mean_read

    @torch.no_grad()
    def _run(self, ids: Tensor, logits_to_keep: int) -> Tensor:
        ids = ids.to(self._model.device)[None]
        out = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=logits_to_keep)
        return out.logits[0]
