"""How close a pipeline stays to full attention on one text, and where it loses attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...adapters.hf import attach
from ...adapters.hf.models import served
from ...adapters.hf.wrappers import decoder_of
from ...pipeline import CachePipeline
from ...store import Report
from ..sessions.pipeline import PipelineSession
from ..sessions.score import PlainSession
from ..tasks.prompts import token_ids
from .lost_mass import LostMass, observed, read_by_last_token


@attrs.frozen(kw_only=True)
class Effect:
    """What one slot of the pipeline did; a neutral policy has nothing to do."""

    slot: str
    policy: str
    neutral: bool
    took_effect: bool
    detail: str


@attrs.frozen(kw_only=True)
class Divergence:
    """The first place where the most likely token differs: after `position + 1` tokens."""

    position: int
    full_id: int
    pipeline_id: int


@attrs.frozen(kw_only=True, eq=False)
class Fidelity:
    """A pipeline against full attention, teacher-forced on one text.

    `kl[i]` is KL(full || pipeline) in nats of the next token after the prompt and `i` decoded
    tokens, `agrees[i]` whether both find the same token most likely. `lost_mass` `[L, Hq]` is the
    softmax mass of full attention on tokens that the pipeline's head did not read, averaged over
    decoded tokens, for layers with keys of their own (0 where they only slide). `report` is the
    cache's after the last token.
    """

    prompt_tokens: int
    kl: tuple[float, ...]
    agrees: tuple[bool, ...]
    divergence: Divergence | None
    lost_mass: Tensor
    effects: tuple[Effect, ...]
    report: Report

    @property
    def mean_kl(self) -> float:
        """Nats."""
        return sum(self.kl) / len(self.kl)

    @property
    def agreement(self) -> float:
        """Part of the positions at which the most likely token is the same."""
        return sum(self.agrees) / len(self.agrees)

    @property
    def without_effect(self) -> tuple[Effect, ...]:
        """Policies that should have done something and did nothing."""
        return tuple(e for e in self.effects if not (e.neutral or e.took_effect))


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    pipeline: CachePipeline,
    text: str | Sequence[int] | Tensor,
    *,
    continuation: int = 64,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunk: int = 64,
) -> Fidelity:
    """Reads a text through the pipeline's real cache and through full attention.

    The last `continuation` tokens are decoded one by one, teacher-forced; all before are the
    prompt. Attention weights exist for `chunk` queries of one layer at a time.

    Args:
        model: a model that the adapters serve, with nothing attached.
        pipeline: what to compare.
        text: token ids `[N]`, or a text with its `tokenizer`.
        continuation: decoded tokens.
        tokenizer: of a text.
        chunk: queries whose attention is weighed at once.

    Raises:
        ValueError: the text is shorter than `continuation + 1` tokens, or has no tokenizer.
    """
    ids = token_ids(text, tokenizer)
    if continuation < 1 or chunk < 1:
        raise ValueError(f"continuation, chunk: wanted at least 1, got {continuation}, {chunk}")
    if len(ids) <= continuation:
        raise ValueError(
            f"text: wanted more than continuation = {continuation} tokens, got {len(ids)}"
        )
    prompt, rest = ids[:-continuation], ids[-continuation:]
    ours, read, report = _decode(model, pipeline, prompt, rest)
    theirs, lost = _observe(model, prompt, rest, read, chunk)
    full, mine = (x.double().log_softmax(-1) for x in (theirs, ours))
    kl = (full.exp() * (full - mine)).sum(-1).clamp(min=0)
    choices = torch.stack([full.argmax(-1), mine.argmax(-1)], 1).tolist()
    first = next((i for i, (a, b) in enumerate(choices) if a != b), None)
    return Fidelity(
        prompt_tokens=len(prompt),
        kl=tuple(kl.tolist()),
        agrees=tuple(a == b for a, b in choices),
        divergence=None
        if first is None
        else Divergence(
            position=len(prompt) - 1 + first,
            full_id=choices[first][0],
            pipeline_id=choices[first][1],
        ),
        lost_mass=lost,
        effects=effects(pipeline, report),
        report=report,
    )


def effects(pipeline: CachePipeline, report: Report) -> tuple[Effect, ...]:
    """What a cache's report says about each slot."""
    held, read = _mean(report.stored), report.mean_read
    dropped = sum(map(sum, report.evicted))
    found = {
        "admission": (report.mean_admitted < 1, f"{report.mean_admitted:.1%} of tokens admitted"),
        "selection": (read < held, f"{read:.0f} of {held:.0f} tokens read by the last token"),
        "eviction": (dropped > 0, f"{dropped:,} tokens evicted, over all heads"),
    }
    return tuple(
        Effect(
            slot=slot,
            policy=type(policy).__name__,
            neutral=policy.neutral,
            took_effect=acted,
            detail=detail,
        )
        for slot, (acted, detail) in found.items()
        for policy in [getattr(pipeline, slot)]
    )


def _mean(rows: list[list[float]]) -> float:
    values = [x for row in rows for x in row]
    return sum(values) / len(values)


def _decode(
    model: PreTrainedModel, pipeline: CachePipeline, prompt: Tensor, rest: Tensor
) -> tuple[Tensor, list[list[Tensor]], Report]:
    """Logits `[C + 1, vocabulary]`, what each layer read at each of C steps, and the report."""
    read: list[list[Tensor]] = []
    with attach(model, pipeline):
        session = PipelineSession(model, pipeline)
        rows = [session.prefill(prompt)]
        session.end_prompt()
        state = session.state

        def note(*_: Any) -> None:
            length = state.lengths[0] + 1
            read.append([read_by_last_token(state, i, length) for i in range(len(state.layers))])

        # Before the hook that commits, which may evict.
        handle = decoder_of(model).register_forward_hook(note, prepend=True)
        try:
            rows += [session.step(token[None])[-1] for token in rest]
        finally:
            handle.remove()
        return torch.stack(rows).cpu(), read, session.report()


def _observe(
    model: PreTrainedModel, prompt: Tensor, rest: Tensor, read: list[list[Tensor]], chunk: int
) -> tuple[Tensor, Tensor]:
    """Logits of full attention `[C + 1, vocabulary]` and the mean lost mass `[L, Hq]`."""
    known = served(model)
    session = PlainSession(model)
    first = session.prefill(prompt)
    heads = max(layer.heads for layer in known.layers)
    mass = LostMass(read, len(known.layers), heads, chunk)
    parts = [rest] if known.probe.goes_on else list(rest.split(1))  # as its states go on
    logits = [first[None]]
    with observed(model, mass):
        for part in parts:
            logits.append(session.step(part))
            mass.done += len(part)
    return torch.cat(logits).cpu(), mass.total / len(rest)
