"""What a figure is measured with: the model, its gates, and how much of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...admission import WriteGate
from . import published


@attrs.frozen(kw_only=True)
class Sizes:
    """How much of a figure is measured; the published settings.

    `parts` are fractions of the cache for baselines, `tokens` what a context of HELMET may have,
    `chunk` the most tokens of a prompt that go through the model at once.
    """

    lambdas: tuple[float, ...] = published.LAMBDAS
    parts: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    tokens: int = 32_768
    contexts: int = 100
    budgets: tuple[int, ...] = published.QUEST_BUDGETS
    reason_lambdas: tuple[float, ...] = published.REASON_LAMBDAS
    cap: int = published.CAP
    new_tokens: int = published.NEW_TOKENS
    lengths: tuple[int, ...] = published.LENGTHS
    steps: int = published.STEPS
    chunk: int = 16_384
    window: int = published.WINDOW


#: What a tiny model does in seconds; its numbers mean nothing.
TINY = Sizes(
    lambdas=(0.04, 0.64), parts=(0.5,), tokens=800, contexts=2, budgets=(48, 96),
    reason_lambdas=(0.32,), cap=48, new_tokens=64, lengths=(96, 192), steps=4, chunk=64, window=16,
)  # fmt: skip


@attrs.frozen(kw_only=True)
class Setup:
    """Everything that a figure needs; `gate` gives the published gate of a lambda.

    `data` are the user's files of the benchmark, `text` a prompt for timing, `duo` the folder of a
    DuoAttention pattern or None. Results go to `out`; no cell starts after `deadline`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    gate: Callable[[float], WriteGate]
    out: Path
    deadline: float
    sizes: Sizes
    made_with: dict[str, str]
    settings: dict[str, Any]
    text: str = ""
    data: tuple[Path, ...] = ()
    duo: Path | None = None
    compiled: bool = False
    say: Callable[[str], object] = print


def gates_of(checkpoints: str, model: str) -> Callable[[float], WriteGate]:
    """The published gates of a model by lambda, from the hub or a folder of their files."""
    name = model.rstrip("/").rpartition("/")[2].lower()

    def gate(lam: float) -> WriteGate:
        return WriteGate.from_pretrained(checkpoints, f"{name}-{lam:g}.pt")

    return gate
