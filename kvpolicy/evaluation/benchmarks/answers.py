"""Free greedy answers of a composition about contexts, and what its cache took for them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...adapters.hf import Attachment, Finished, KVPolicyCache, Request
from ...errors import UnsupportedError
from ...store import Report
from ..grid.records import Footprint
from ..sessions import look_back
from ..sessions.pipeline import settled
from ..tasks.prompts import Ids
from .chat import Reading


@attrs.frozen(kw_only=True)
class Answered:
    """What came of contexts read together.

    `texts` are the answers, a tuple a context. `sizes` are those of one context's cache once it is
    read, before its questions, and `held_after` the tokens that a head holds after the answers, the
    window included; `kv_footprint` is entries stored times the steps that they stay, as
    a part of full attention's (arXiv 2506.17121), questions and answers included.
    """

    texts: tuple[tuple[str, ...], ...]
    sizes: Footprint
    kv_footprint: float
    held_after: float


@attrs.frozen(kw_only=True)
class Asker:
    """Asks a model that a pipeline is attached to; answers are greedy.

    `after` is what the chat template puts behind a user's message, for evictions that let the
    model repeat its context. `drawn` are options of `generate` by which tokens are drawn instead.
    With `slots` so many questions are asked at once, and one that has its answer makes room for the
    next, where the pipeline and the model allow it; else all questions of a group at once.
    """

    here: Attachment
    tokenizer: PreTrainedTokenizerBase
    after: str = "\n"
    drawn: Mapping[str, Any] = attrs.field(factory=dict)
    slots: int | None = None

    @torch.no_grad()
    def answers(self, group: Sequence[Reading]) -> Answered:
        """Answers to all questions of some contexts, each context in a sequence of its own."""
        cache = self._read(group)
        report = settled(cache)
        rows = [row for row, reading in enumerate(group) for _ in reading.questions]
        asked = [question for reading in group for question in reading.questions]
        most = [new for reading in group for new in reading.new_tokens]
        kept, held_after = self._in_slots(cache, rows, asked, most) or self._at_once(
            cache, rows, asked, most
        )
        texts = iter([str(self.tokenizer.decode(x, skip_special_tokens=True)) for x in kept])
        spent = statistics.fmean(len(q) + len(a) for q, a in zip(asked, kept, strict=True))
        return Answered(
            texts=tuple(tuple(next(texts) for _ in reading.questions) for reading in group),
            sizes=self._sizes(cache, report, asked[0][-1]),
            kv_footprint=kv_footprint(report, self.here.pipeline.window, spent),
            held_after=held_after,
        )

    def _at_once(
        self, cache: KVPolicyCache, rows: list[int], asked: Sequence[Ids], most: Sequence[int]
    ) -> tuple[list[list[int]], float]:
        """Answers to questions about sequences `rows`, and what a head holds after them."""
        ids, mask = self._block(asked)
        told = self._options(max(most)) | {"return_dict_in_generate": True}
        replies = self.here.ask(cache.fork(rows), ids, mask, **told)
        kept = [
            self._until_end(row.tolist()[ids.shape[1] :][:new])
            for row, new in zip(replies.sequences, most, strict=True)
        ]
        return kept, _mean(replies.past_key_values.report().stored)

    def _in_slots(
        self, cache: KVPolicyCache, rows: list[int], asked: Sequence[Ids], most: Sequence[int]
    ) -> tuple[list[list[int]], float] | None:
        """The same in slots; None where they do not serve."""
        if self.slots is None:
            return None
        requests = [
            Request(ids, id=place, seed=int(torch.randint(1 << 31, ())), **self._options(new))
            for place, (ids, new) in enumerate(zip(asked, most, strict=True))
        ]
        try:
            answering = self.here.ask_many(cache, requests, rows=rows, slots=self.slots)
        except UnsupportedError:
            return None
        found: dict[Any, Finished] = {}
        for one in answering:
            if one.error is not None:
                raise one.error
            found[one.id] = one
        answers = [found[place] for place in range(len(requests))]
        held = [_mean(one.held.stored) for one in answers if one.held is not None]
        return [self._until_end(one.tokens) for one in answers], statistics.fmean(held)

    @torch.no_grad()
    def first_token(self, reading: Reading) -> float:
        """Seconds from the start of a context alone to the first token of an answer about it."""
        ids, mask = self._block(reading.questions[:1])
        self._wait()
        began = time.monotonic()
        cache = self._read([reading])
        self.here.ask(cache, ids, mask, **self._options(1))
        self._wait()
        return time.monotonic() - began

    def _read(self, group: Sequence[Reading]) -> KVPolicyCache:
        ids, mask = self._block([reading.context for reading in group])
        if not self.here.pipeline.eviction.replayed:
            return self.here.read(ids, mask)
        cache = self.here.new_cache()
        cache.begin_prompt()
        self.here.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        contexts = [reading.context for reading in group]
        look_back.look_back(self.here, cache, contexts, self.tokenizer, self.after)
        cache.end_prompt()
        return cache

    def _sizes(self, cache: KVPolicyCache, found: Report, token: int) -> Footprint:
        """Of one of the cache's sequences; what a token reads is seen by a `token` after it."""
        assert cache.state is not None
        spec, batch = cache.spec, cache.state.batch
        twin = cache.fork()
        after = torch.full((batch, 1), token, device=self.here.model.device)
        self.here.model(input_ids=after, past_key_values=twin)
        heads = sum(map(len, found.stored))
        each = 2 * spec.head_dim * spec.dtype.itemsize
        return Footprint(
            held_tokens=_mean(found.stored),
            seen_tokens=found.tokens / batch,
            read_tokens=twin.report().mean_read,
            bytes=found.total / batch,
            kv_bytes=found.kv / batch,
            slots=found.kv / batch / heads / each - spec.rollback,
            admitted=found.mean_admitted,
            evicted=sum(map(sum, found.evicted)) / batch,
        )

    def _block(self, rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Ids `[B, S]` padded on the left, and which are real, as an attention mask."""
        width = max(map(len, rows))
        ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows])
        mask = torch.tensor([[int(i >= width - len(row)) for i in range(width)] for row in rows])
        return ids.to(self.here.model.device), mask.to(self.here.model.device)

    def _options(self, new_tokens: int) -> dict[str, Any]:
        """Options of `generate`; what a model's own generation config draws or punishes is off."""
        found: dict[str, Any] = {
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "min_new_tokens": None,
            "max_new_tokens": new_tokens,
        }
        ends = sorted(ends_of(self.here.model, self.tokenizer))
        if ends:
            pad = self.tokenizer.pad_token_id
            found |= {"eos_token_id": ends, "pad_token_id": ends[0] if pad is None else pad}
        return found | dict(self.drawn)

    def _until_end(self, ids: list[int]) -> list[int]:
        ends = ends_of(self.here.model, self.tokenizer)
        return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]

    def _wait(self) -> None:
        if self.here.model.device.type == "cuda":
            torch.cuda.synchronize(self.here.model.device)


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a reply: all of the model's generation config, and the tokenizer's."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    several = found if isinstance(found, list | tuple) else [found]
    return frozenset(x for x in (*several, tokenizer.eos_token_id) if x is not None)


def kv_footprint(report: Report, window: int, asked: float) -> float:
    """The KV footprint of a context's cache with so many tokens asked and answered after it.

    A head holds all of the first `window` tokens and grows evenly from there to what it holds when
    the context ends, evicted tokens included; an eviction then acts at once. In units of tokens
    times steps, over those of full attention.
    """
    seen, held = report.tokens / report.sequences, _mean(report.stored)
    peak = held + _mean(report.evicted) / report.sequences
    near = min(window, seen)
    read = _steps(near) + (seen - near) * (near + peak) / 2 + (peak - near) / 2
    return (read + asked * held + _steps(asked)) / _steps(seen + asked)


def _steps(count: float) -> float:
    """1 + 2 + ... + count."""
    return count * (count + 1) / 2


def _mean(values: Sequence[Sequence[float]]) -> float:
    return statistics.fmean(x for layer in values for x in layer)
