"""Trains gates of one recipe and measures pipelines on held-out text, each once a folder."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...admission import WriteGate
from ...pipeline import CachePipeline
from ...training import GateTraining, train_write_gate
from ..finished import Finished, Part
from ..grid.cell import answer, read_text
from ..grid.records import Measured
from ..sessions.estimates import estimate
from ..tasks import TASKS
from ..tasks.prompts import Example

ASKED = "eight needles"
#: One for all documents, or one made for each from its ids `[N]`.
Pipelines = CachePipeline | Callable[[Tensor], CachePipeline]


class OutOfTime(Exception):
    """The time limit came before the ablation was finished."""


@attrs.frozen(kw_only=True)
class Recipe:
    """How every gate is trained but for what an ablation changes, and how much is measured.

    `taus` are thresholds at which a gate is measured, `contexts` documents and contexts of
    `length` tokens.
    """

    training: GateTraining
    taus: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.4)
    lambdas: tuple[float, ...] = (0.04, 0.16, 0.64, 2.56)
    windows: tuple[int, ...] = (1, 16, 64, 256)
    widths: tuple[float, ...] = (1.0, 2.0, 4.0)
    parts: tuple[float, ...] = (0.5, 0.25, 0.125)
    length: int = 4096
    contexts: int = 25
    asks: bool = True
    page_size: int = 4


@attrs.frozen(kw_only=True)
class Lab:
    """A model, texts to train on, held-out text by kind, and the folder of what is finished.

    `asked[""]` is the text that is like nothing in particular: prose that no gate saw.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    asked: Mapping[str, str]
    out: Path
    recipe: Recipe
    settings: Mapping[str, Any]
    deadline: float
    say: Callable[[str], object] = print
    _prompts: dict[tuple[str, str], Sequence[Any]] = attrs.field(factory=dict)

    def gate(self, name: str = "base", **changes: Any) -> WriteGate:
        """The gate of the recipe with some settings changed; an earlier run's is read."""
        told = attrs.evolve(self.recipe.training, **changes)
        path = self.out / "gates" / f"{name}.safetensors"
        parts = self._finished(training=attrs.asdict(told))
        parts.of(f"gate-{name}", lambda: self._train(told, path))
        return WriteGate.from_pretrained(path)

    def measured(
        self, name: str, pipeline: Pipelines, kind: str = "", *, reads: bool = True
    ) -> Part:
        """What a pipeline holds and loses on a kind of held-out text.

        `held` is the part of the cache after a document, `loss` and `hit_loss` its next-token
        losses in nats; `held_asked` and `accuracy` are those of eight needles hidden in such text,
        the question unseen. Each has its standard error. Without `reads` needles alone are asked,
        as an eviction at a prompt's end needs.
        """
        text = hashlib.sha256(self.asked[kind].encode()).hexdigest()[:16]
        parts = self._finished(text=text, length=self.recipe.length, contexts=self.recipe.contexts)
        label = f"{name}-{kind}" if kind else name
        found = parts.of(
            label.replace(" ", "-"), lambda: self._measure(pipeline, kind, reads=reads)
        )
        numbers = {k: v for k, v in found.items() if v is not None and not k.endswith("_error")}
        self.say(f"{label}: {', '.join(f'{k} {v:.4g}' for k, v in numbers.items())}")
        return found

    def check(self) -> None:
        """Raises OutOfTime after the deadline."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def documents(self, kind: str = "") -> Sequence[Tensor]:
        """Held-out documents `[N]` of a kind."""
        return self._made("loss", kind)

    def examples(self, kind: str = "") -> Sequence[Example]:
        """Contexts of a kind with hidden needles and questions about them."""
        return self._made(ASKED, kind)

    def _made(self, task: str, kind: str) -> Sequence[Any]:
        if (task, kind) not in self._prompts:
            self._prompts[task, kind] = TASKS[task].make(
                self.tokenizer,
                self.asked[kind],
                length=self.recipe.length,
                contexts=self.recipe.contexts,
            )
        return self._prompts[task, kind]

    def _finished(self, **more: Any) -> Finished:
        return Finished(self.out / "parts", {**self.settings, **more})

    def _train(self, told: GateTraining, path: Path) -> Part:
        self.check()
        began = time.monotonic()
        trained = train_write_gate(
            self.model,
            list(self.texts),
            told,
            tokenizer=self.tokenizer,
            out_dir=path.with_suffix(""),
            save_every=100,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        trained.save(path)
        seconds = time.monotonic() - began
        self.say(f"{path.stem}: trained {told.steps} steps in {seconds:.0f} s, {trained.keep:.1%}")
        return {"keep": trained.keep, "lam": trained.lam, "seconds": seconds}

    def _measure(self, pipeline: Pipelines, kind: str, *, reads: bool) -> Part:
        self.check()
        found: Part = {}
        scores: dict[str, Sequence[float]] = {}
        if reads:
            read = self._each(pipeline, self.documents(kind), lambda ids: ids, read_text)
            found["held"] = statistics.fmean(x.footprint.held for x in read)
            scores |= {n: [y for x in read for y in x.scores[n]] for n in ("loss", "hit_loss")}
        if self.recipe.asks or not reads:
            ask = partial(answer, question_in_prompt=False)
            done = self._each(pipeline, self.examples(kind), _context, ask)
            found["held_asked"] = statistics.fmean(x.footprint.held for x in done)
            scores["accuracy"] = [y for x in done for y in x.scores["accuracy"]]
        for name, values in scores.items():
            of = estimate(values)
            found |= {name: of.mean, f"{name}_error": of.standard_error}
        # NaN is no JSON: one context has no error, and a text may have no hit tokens.
        return {k: None if math.isnan(v) else v for k, v in found.items()}

    def _each(
        self,
        pipeline: Pipelines,
        items: Sequence[Any],
        ids_of: Callable[[Any], Tensor],
        run: Callable[..., Measured],
    ) -> list[Measured]:
        """All items at once, or one by one where the pipeline differs by document."""
        size = self.recipe.page_size
        if isinstance(pipeline, CachePipeline):
            return [run(self.model, pipeline, list(items), page_size=size)]
        return [run(self.model, pipeline(ids_of(x)), [x], page_size=size) for x in items]


def _context(example: Example) -> Tensor:
    return torch.tensor(example.context_ids)
