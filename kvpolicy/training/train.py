"""Training of write gates by distillation (WG-KV, with the cache size as the target)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from accelerate import Accelerator
from transformers import get_cosine_schedule_with_warmup

from ..adapters.hf.models import keys_fingerprint
from ..adapters.hf.training import AttachedModel, attach_for_training
from .controller import KeepController
from .data import Texts, TrainingMix, as_mix
from .gate import TrainedGate, WriteGates
from .objective import Kernel, answer_loss, distillation_loss, kept_fraction, memory_cost
from .run import Run, Stateful, average_gradients
from .student import Evaluation, evaluate_gates, gated_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Stream = tuple[TrainingMix, int]  # sequences of one length, and how many of them make a step
_HELD_OUT_RANK = -1  # a stream of batches that no process trains on


def train_write_gate(
    model: PreTrainedModel,
    texts: Texts | TrainingMix,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps: int,
    window: int = 64,
    target_keep: float | None = None,
    lam: float | None = None,
    length: int | Sequence[int] = 4096,
    batch_size: int = 2,
    threshold: float = 0.1,
    expand: float = 4.0,
    lr: float = 1e-3,
    seed: int = 0,
    start: WriteGates | None = None,
    start_lam: float = 0.16,
    ungated: int = 0,
    answer_share: float = 0.0,
    kernel: Kernel = "auto",
    checkpointing: bool = True,
    eval_every: int = 0,
    out_dir: str | Path | None = None,
    save_every: int = 0,
    stop_after: int | None = None,
) -> TrainedGate:
    """Train the write gates of a frozen model.

    Minimises MSE(final hidden states of the gated and of the plain model) + lambda R with AdamW
    (weight decay 0.01), 10 % linear warm-up and a cosine to zero. `answer_share` of the MSE is
    taken where answers are predicted (ours; the published loss has 0). Under `accelerate launch`
    every process takes its own batches and gradients are averaged.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 causal language model, on its device.
        texts: documents, see `documents`, or a ready stream of batches.
        tokenizer: needed for documents.
        steps: optimiser steps.
        window: tokens of the local window W.
        target_keep: wanted fraction of tokens in the cache, window included; steers lambda.
        lam: a fixed lambda instead.
        length: tokens of a training sequence, for documents; several take turns.
        batch_size: sequences a step and process, of the longest length; about as many tokens
            of others.
        threshold: of the hard decision, for the kept fraction and evaluation.
        expand: hidden units of the gate per channel of a head.
        lr: peak learning rate.
        seed: of initialisation and data.
        start: gates to continue from (not changed); fresh ones by default.
        start_lam: first lambda when steered.
        ungated: random positions of each head that are open in a step (published, default 0).
        answer_share: part in [0, 1) of the loss that is the error where answers are predicted.
        kernel: attention kernel of the student, see gated_attention.
        checkpointing: recompute activations layer by layer.
        eval_every: steps between hard evaluations on held-out batches; 0 for none.
        out_dir: folder for `metrics.jsonl` and `state.pt`; training resumes from the latter.
        save_every: steps between saves of `state.pt`; 0 for the end only.
        stop_after: stop (and save) at this step of the schedule, to be resumed later.

    Raises:
        ValueError: not exactly one of `target_keep` and `lam`, a share outside [0, 1), several
            lengths for a ready stream, or sizes that do not fit.

    Source: EMCLab-Sinica/WG-KV, `scripts/train.py`.
    """
    if (target_keep is None) == (lam is None):
        raise ValueError(f"give target_keep or lam, got target_keep={target_keep}, lam={lam}")
    if not 0 <= answer_share < 1:
        raise ValueError(f"answer_share must be in [0, 1), got {answer_share}")
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    rank, most = accelerator.process_index, steps * batch_size * accelerator.num_processes
    streams = _streams(texts, tokenizer, length, batch_size, seed, most)
    least = sum(window / mix.length for mix, _ in streams) / len(streams)
    if target_keep is not None and target_keep <= least:
        raise ValueError(
            f"target_keep must exceed window / length = {least:.3g}, got {target_keep}"
        )
    gates = _fresh_gates(model, expand, seed)
    if start is not None:
        gates.load_state_dict(start.state_dict())
    steer = None if target_keep is None else KeepController(target=target_keep)
    if steer is not None:
        steer.log_lam = math.log(start_lam)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    parts: dict[str, Stateful] = {"gates": gates, "optimizer": optimizer, "schedule": schedule}
    if steer is not None:
        parts["controller"] = steer
    settings = {
        "model": keys_fingerprint(model), "steps": steps, "window": window,
        "target_keep": target_keep, "lam": lam, "batch_size": batch_size,
        "length": [mix.length for mix, _ in streams], "answer_share": answer_share,
        "threshold": threshold, "lr": lr, "seed": seed, "ungated": ungated,
        "processes": accelerator.num_processes,
    }  # fmt: skip
    run = Run(out_dir, main=accelerator.is_main_process, settings=settings, parts=parts)
    step, more = run.load()
    keep = more.get("keep", float("nan"))

    with attach_for_training(model, checkpointing=checkpointing) as attached:
        while step < min(steps, stop_after or steps):
            began = time.perf_counter()
            mix, size = streams[step % len(streams)]
            batch = mix.batch(step, size, rank=rank)
            ids = batch.input_ids.to(model.device)
            weight = cast(float, lam if steer is None else steer.lam)
            with torch.no_grad():
                teacher = attached.hidden(ids)
            student = gated_forward(
                attached, gates, ids, window=window, kernel=kernel, ungated=ungated,
                seed=(seed * steps + step) * accelerator.num_processes + rank,
            )  # fmt: skip
            loss = distillation_loss(student.hidden, teacher)
            asked = answer_loss(student.hidden, teacher, batch.answers) if answer_share else None
            if asked is not None:
                loss = (1 - answer_share) * loss + answer_share * asked
            cost = memory_cost(student.gate, window)
            optimizer.zero_grad(set_to_none=True)
            (loss + weight * cost).backward()
            average_gradients(accelerator, gates.parameters())
            optimizer.step()
            schedule.step()
            free = student.free.detach()
            kept: Any = kept_fraction(free, window=window, threshold=threshold).mean()
            keep = float(accelerator.reduce(kept, "mean"))
            if steer is not None:
                steer.update(keep)
            step += 1
            metrics: dict[str, Any] = {
                "step": step,
                "loss": loss.item(),
                "cost": cost.item(),
                "keep": keep,
                "lam": weight,
                "seconds": round(time.perf_counter() - began, 4),
            }
            if eval_every and step % eval_every == 0:
                hard = _hard(attached, gates, model, streams, window, threshold, kernel)
                metrics["hard"] = hard._asdict()
            run.log(metrics)
            if save_every and step % save_every == 0:
                run.save(step, keep=keep)
        run.save(step, keep=keep)
    return TrainedGate(
        gates=gates,
        window=window,
        threshold=threshold,
        lam=float(lam if steer is None else steer.lam),  # type: ignore[arg-type]
        keep=keep if steer is None or steer.keep is None else steer.keep,
        fingerprint=keys_fingerprint(model),
    )


def _streams(
    texts: Texts | TrainingMix,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int | Sequence[int],
    batch_size: int,
    seed: int,
    sequences: int,
) -> list[Stream]:
    """A stream of sequences for each length, and how many of them make a step."""
    lengths = [length] if isinstance(length, int) else list(length)
    if not lengths or min(lengths) < 2:
        raise ValueError(f"length: wanted one or more, each at least 2, got {length!r}")
    if isinstance(texts, TrainingMix):
        if len(lengths) > 1:
            raise ValueError(f"length: a ready stream has its own, got {length!r}")
        return [(texts, batch_size)]
    longest = max(lengths)
    mix = as_mix(texts, tokenizer, longest, seed, sequences=sequences)
    return [(attrs.evolve(mix, length=n), batch_size * longest // n) for n in lengths]


def _fresh_gates(model: PreTrainedModel, expand: float, seed: int) -> WriteGates:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WriteGates.for_model(model, expand)


def _hard(
    attached: AttachedModel,
    gates: WriteGates,
    model: PreTrainedModel,
    streams: list[Stream],
    window: int,
    threshold: float,
    kernel: Kernel,
) -> Evaluation:
    batches = [
        tuple(mix.batch(n, size, rank=_HELD_OUT_RANK)) for n, (mix, size) in enumerate(4 * streams)
    ]
    return evaluate_gates(
        attached,
        gates,
        model.get_output_embeddings(),
        batches,  # type: ignore[arg-type]
        window=window,
        threshold=threshold,
        kernel=kernel,
    )
