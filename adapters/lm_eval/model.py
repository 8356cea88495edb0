"""The model that lm-evaluation-harness runs: HFLM's, attached to a pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..._arguments import optional
from ..._extras import extra
from ..._fields import check_int
from ...errors import UnsupportedError
from ...pipeline import CachePipeline
from ...pipeline_files import load_pipeline
from ...spec import Sizes
from ...store.fingerprint import pipeline_fingerprint
from ..hf import KVPolicyCache, attach
from ..hf.continuations import Continued, Ids, continued
from .answers import keyed
from .generated import generated
from .measured import Measured

with extra("lm-eval"):
    from lm_eval.models.huggingface import HFLM, stop_sequences_criteria

Key = tuple[Ids, Ids]
PER_SLOT = 16  # requests of `generate_until` that go into a call, for each slot
ROLLING, CONTINUED, GENERATED = "loglikelihood_rolling", "loglikelihood", "generate_until"


class KVPolicyLM(HFLM):  # type: ignore[misc]
    """lm-eval's `hf` model with a pipeline attached for as long as it lives.

    In `loglikelihood` tasks a context is the prompt, up to its last token; that and the
    continuation are decoded tokens, as in `Attachment.loglikelihood`. In `generate_until` tasks
    `generate` serves as it does everywhere. In `loglikelihood_rolling` tasks all but the first
    token of a window is decoded, so that nothing may depend on a prompt's end.

    Args:
        pretrained: as HFLM's, a name, a folder or a model.
        pipeline: a CachePipeline, or the name of its file.
        trust_code: whether the file may import policies of yours.
        many: slots in which `generate_until` serves its requests, each as it comes to an end; by
            default they are padded batches of `batch_size`.
        options: sizes of caches (`page_size`, `interval`, `max_bytes`, ...), and HFLM's arguments.
    """

    batch_size_per_gpu: int  # HFLM's

    def __init__(
        self,
        pretrained: Any,
        pipeline: CachePipeline | str,
        *,
        trust_code: bool = False,
        many: int | None = None,
        **options: Any,
    ) -> None:
        optional(check_int, "many", many, 1)
        if not isinstance(pipeline, CachePipeline):
            pipeline = load_pipeline(pipeline, trust_code=trust_code)
        sizes: Any = {name: options.pop(name) for name in Sizes.__annotations__ if name in options}
        super().__init__(pretrained, **options)
        self.attached = attach(self.model, pipeline, **sizes)
        self.many = many
        self.measured: dict[str, Measured] = {}
        described = f"{pipeline_fingerprint(pipeline)} {sorted(sizes.items())}"
        self.key = hashlib.sha256(described.encode()).hexdigest()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Keys lm-eval's file of answers by the pipeline and the caches' sizes."""
        if cache_hook.dbdict is not None:
            keyed(cache_hook.dbdict, self.key)
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's, with the pipeline and what its caches took; lm-eval puts it into the results."""
        told = {
            "pipeline": str(self.attached.pipeline),
            "fingerprint": pipeline_fingerprint(self.attached.pipeline),
            "sizes": dict(self.attached.sizes),
            "measured": {kind: found.record() for kind, found in self.measured.items()},
        }
        return {**super().get_model_info(), "kvpolicy": told}

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        spec, eviction = self.attached.spec, self.attached.pipeline.eviction
        for policy in map(eviction.at, range(spec.layers)):
            if not policy.neutral and policy.when == "prompt_end":
                raise UnsupportedError(
                    f"{ROLLING}: a rolled text has no prompt, so {type(policy).__name__}, which "
                    'evicts at its end, would do nothing; take an eviction with when="decode", or '
                    "tasks with a context"
                )
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Sums of log-probabilities, and whether each continuation is what greedy decoding gives.

        Requests that differ in their last token only are one row, and rows of one context share it.
        """
        asked: dict[Key, list[int]] = {}
        ends: list[int] = []
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"continuation: wanted at most max_length={self.max_length} tokens, got "
                    f"{len(continuation)}"
                )
            over = max(len(context) + len(continuation) - self.max_length - 1, 0)
            *more, last = continuation
            asked.setdefault((tuple(context[over:]), tuple(more)), []).append(index)
            ends.append(last)
        answers: dict[int, tuple[float, bool]] = {}
        off = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=off, desc=f"{CONTINUED} requests") as bar:
            for keys in self._batches(list(asked), override_bs):
                kind = ROLLING if requests[asked[keys[0]][0]][0] is None else CONTINUED
                for key, row in zip(keys, self._continued(keys, kind), strict=True):
                    for index in asked[key]:
                        answers[index] = _answer(row, key[1], ends[index])
                        if (told := requests[index][0]) is not None:
                            self.cache_hook.add_partial(CONTINUED, told, answers[index])
                    bar.update(len(asked[key]))
        return [answers[index] for index in range(len(requests))]

    def _batches(self, keys: list[Key], size: int | None) -> Iterator[list[Key]]:
        """The longest first, which tells early what does not fit; those of one context together."""
        keys = sorted(keys, key=lambda key: (-len(key[0]), key[0], -len(key[1]), key[1]))
        if size is None:
            size = self.batch_size if self.batch_size != "auto" else self._largest_batch(keys)
        for start in range(0, len(keys), size):
            yield keys[start : start + size]

    def _largest_batch(self, keys: list[Key]) -> int:
        found: int = self._detect_batch_size([(None, *map(list, keys[0]))])
        self.batch_sizes = {0: found}
        return found

    def _continued(self, keys: list[Key], kind: str) -> list[Continued]:
        def measure(cache: KVPolicyCache) -> None:
            assert cache.state is not None
            self._measured(kind).add(cache.report(), cache.spec, cache.state.batch)

        with self._autocast():
            return continued(self.attached, keys, self.softmax_dtype, measure)

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        """Logits `[B, 1, V]` after `inps` `[B, S]`: what HFLM tries to find a batch's size."""
        with self._autocast():
            rows = continued(self.attached, [(tuple(ids), ()) for ids in inps.tolist()])
        return torch.stack([row.last for row in rows])[:, None]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        before = self.batch_size_per_gpu
        if self.many is not None:
            self.batch_size_per_gpu = self.many * PER_SLOT
        try:
            found: list[str] = super().generate_until(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = before
        return found

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Tensor:
        if self.many is not None:
            return self._many(self.many, context, max_length, stop, generation_kwargs)
        out: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        beams = generation_kwargs.get("num_beams") or 1
        report, spec = self.attached.last_report(), self.attached.spec
        self._measured(GENERATED).add(report, spec, len(context) * beams)
        return out

    def _many(
        self, slots: int, context: Tensor, max_length: int, stop: list[str], options: dict[str, Any]
    ) -> Tensor:
        mask = options.pop("attention_mask", None)
        if not options.get("temperature") and not options.get("do_sample"):  # as HFLM reads it
            options.pop("temperature", None)
            options["do_sample"] = False
        measured, spec = self._measured(GENERATED), self.attached.spec
        with self._autocast():
            return generated(
                self.attached,
                context,
                torch.ones_like(context) if mask is None else mask,
                max_length - context.shape[1],
                slots,
                lambda: stop_sequences_criteria(self.tokenizer, stop, 0, 1),
                lambda finished: measured.add_held(finished.held, spec),
                {"pad_token_id": self.tokenizer.pad_token_id, **options},
            )

    def _measured(self, kind: str) -> Measured:
        return self.measured.setdefault(kind, Measured())

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def _answer(row: Continued, more: Ids, last: int) -> tuple[float, bool]:
    score = torch.cat([row.chosen, row.last[last : last + 1]]).sum()
    return float(score), row.best == (*more, last)
