"""One gated forward of an attached model, soft for training or hard as the cache will be."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.hf.fingerprints import gathered
from ..adapters.hf.training import AttachedModel, Attended
from .gate import WriteGates
from .objective import Kernel, gated_attention, kept_fraction, log_gate, ungate


class Forward(NamedTuple):
    """`hidden [B, N, hidden]` after the final norm, and gates `[L, B, Hkv, N]`.

    `gate` is what the student attended with, `free` the same before random positions were opened.
    """

    hidden: Tensor
    gate: Tensor
    free: Tensor


def gated_forward(
    model: AttachedModel,
    gates: WriteGates,
    input_ids: Tensor,
    *,
    window: int,
    threshold: float | None = None,
    kernel: Kernel = "auto",
    ungated: int = 0,
    seed: int = 0,
) -> Forward:
    """Run the student.

    Args:
        model: an attached model.
        gates: its gates.
        input_ids: `[B, N]`, no padding.
        window: tokens of the local window.
        threshold: None for soft gates; else far tokens with gate <= threshold are not seen.
        kernel: see gated_attention.
        ungated: random positions of each head whose soft gate is 1.
        seed: of these positions.

    Raises:
        ValueError: every layer slides, so that there is nothing to gate.
    """
    seen: dict[int, Tensor] = {}
    free: dict[int, Tensor] = {}

    def rule(attended: Attended) -> Tensor:
        layer = attended.layer
        # A layer that reads another's keys sees what that one's gates admitted.
        gate = gates.layers[layer](attended.key_pre, attended.key)
        # A recomputed layer keeps the gates of its first run.
        free.setdefault(layer, gate)
        if threshold is None:
            gate = ungate(gate, ungated, seed * len(gates.layers) + layer)
        seen.setdefault(layer, gate)
        return gated_attention(
            attended.query, attended.key, attended.value, log_gate(gate, threshold), window=window,
            scale=attended.scale, softcap=attended.softcap, sinks=attended.sinks, kernel=kernel,
        )  # fmt: skip

    hidden = model.hidden(input_ids, rule)
    if not seen:
        raise ValueError("model: every layer uses a sliding window, there is nothing to gate")
    stacked = torch.stack([seen[layer] for layer in sorted(seen)])
    return Forward(
        hidden, stacked, torch.stack([free[x] for x in sorted(free)]) if ungated else stacked
    )


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
    kernel: Kernel = "auto",
) -> Evaluation:
    """Hard-threshold evaluation on `(input_ids [B, N], answers [B, N])` batches.

    Args:
        model: the frozen model, attached for training.
        gates: what is judged.
        head: the model's language-model head.
        batches: what is read, a sequence or several at a time; `answers` marks the tokens whose
            prediction counts.
        window: tokens of the local window.
        threshold: a token is admitted if its gate > threshold.
        kernel: of the student's attention.
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
            picked = _logits(head, hidden[:, :-1][answers[:, 1:]]).argmax(-1)
            right = int((picked == wanted).sum())
            hits, hits_full = (hits, hits_full + right) if full else (hits + right, hits_full)
    nan = float("nan")
    return Evaluation(
        loss, keep, hits / asked if asked else nan, hits_full / asked if asked else nan
    )


def _logits(head: torch.nn.Module, hidden: Tensor) -> Tensor:
    weight = cast(Tensor, head.weight)
    if not hasattr(weight, "full_tensor"):
        return cast(Tensor, head(hidden.to(weight.dtype)))
    # Of a weight that ranks hold in parts; its own hooks belong to the model's forward.
    bias = gathered(getattr(head, "bias", None))
    return F.linear(hidden.to(weight.dtype), gathered(weight), bias)
