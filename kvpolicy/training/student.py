"""One gated forward of an attached model, soft for training or hard as the cache will be."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from .attach import AttachedModel
from .gate import WriteGates
from .objective import Kernel, gated_attention, kept_fraction, log_gate


class Forward(NamedTuple):
    """`hidden [B, N, hidden]` after the final norm; `gate [L, B, Hkv, N]`."""

    hidden: Tensor
    gate: Tensor


def gated_forward(
    model: AttachedModel,
    gates: WriteGates,
    input_ids: Tensor,
    *,
    window: int,
    threshold: float | None = None,
    kernel: Kernel = "dense",
) -> Forward:
    """Run the student.

    Args:
        model: an attached model.
        gates: its gates.
        input_ids: `[B, N]`, no padding.
        window: tokens of the local window.
        threshold: None for soft gates; else far tokens with gate <= threshold are not seen.
        kernel: see gated_attention.

    Raises:
        ValueError: every layer slides, so that there is nothing to gate.
    """
    seen: dict[int, Tensor] = {}

    def rule(
        layer: int, query: Tensor, key: Tensor, value: Tensor, key_pre: Tensor, scale: float
    ) -> Tensor:
        gate = gates.layers[layer](key_pre, key)
        seen.setdefault(layer, gate)  # a recomputed layer keeps the gate of its first run
        bias = log_gate(gate, threshold)
        return gated_attention(query, key, value, bias, window=window, scale=scale, kernel=kernel)

    hidden = model.hidden(input_ids, rule)
    if not seen:
        raise ValueError("model: every layer uses a sliding window, there is nothing to gate")
    return Forward(hidden, torch.stack([seen[layer] for layer in sorted(seen)]))


class Evaluation(NamedTuple):
    """Of hard-thresholded gates: means over sequences."""

    loss: float
    """Distillation loss on all tokens."""
    keep: float
    """Fraction of tokens in the cache at the end, the window included."""
    accuracy: float
    """Teacher-forced accuracy on answer tokens with the gates; NaN without answers."""
    accuracy_full: float
    """The same with full attention."""


@torch.no_grad()
def evaluate_gates(
    model: AttachedModel,
    gates: WriteGates,
    head: torch.nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    *,
    window: int,
    threshold: float,
    kernel: Kernel = "dense",
) -> Evaluation:
    """Hard-threshold evaluation on `(input_ids [B, N], answers [B, N])` batches.

    Args:
        head: the model's language-model head.
    """
    loss = keep = 0.0
    hits, hits_full, asked = 0, 0, 0
    device = next(gates.parameters()).device
    for ids, answers in batches:
        ids, answers = ids.to(device), answers.to(device)
        teacher = model.hidden(ids)
        student = gated_forward(
            model, gates, ids, window=window, threshold=threshold, kernel=kernel
        )
        loss += (student.hidden.float() - teacher.float()).square().mean().item() / len(batches)
        kept = kept_fraction(student.gate, window=window, threshold=threshold)
        keep += kept.mean().item() / len(batches)
        wanted = ids[:, 1:][answers[:, 1:]]
        asked += wanted.numel()
        for hidden, full in ((student.hidden, False), (teacher, True)):
            picked = head(
                hidden[:, :-1][answers[:, 1:]].to(cast(Tensor, head.weight).dtype)
            ).argmax(-1)
            right = int((picked == wanted).sum())
            hits, hits_full = (hits, hits_full + right) if full else (hits + right, hits_full)
    nan = float("nan")
    return Evaluation(
        loss, keep, hits / asked if asked else nan, hits_full / asked if asked else nan
    )
