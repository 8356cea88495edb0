"""Training of write gates by distillation (WG-KV, with the cache size as the target)."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from accelerate import Accelerator
from transformers import get_cosine_schedule_with_warmup

from ..adapters.hf.fingerprints import keys_fingerprint
from ..adapters.hf.models import attention_layers
from ..adapters.hf.training import AttachedModel, attach_for_training
from .controller import KeepController
from .data import MIXES, Texts, TrainingMix, as_mix
from .gate import TrainedGate, WriteGates
from .objective import answer_loss, distillation_loss, kept_fraction, memory_cost
from .run import Progress, Run, Stateful, average_gradients
from .settings import GateTraining
from .student import Evaluation, evaluate_gates, gated_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Stream = tuple[TrainingMix, int]  # sequences of one length, and how many of them make a step
# What does not change the result, so that a run may be resumed with another.
_FREE = ("kernel", "checkpointing", "eval_every")
_HELD_OUT_RANK = -1  # a stream of batches that no process trains on


def train_write_gate(
    model: PreTrainedModel,
    texts: Texts | TrainingMix,
    settings: GateTraining | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    start: WriteGates | None = None,
    out_dir: str | Path | None = None,
    save_every: int = 0,
    stop_after: int | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> TrainedGate:
    """Train the write gates of a frozen model.

    Minimises MSE(final hidden states of the gated and of the plain model) + lambda R with AdamW
    (weight decay 0.01), 10 % linear warm-up and a cosine to zero. Under `accelerate launch` every
    process takes its own batches and gradients are averaged.

    Args:
        model: a causal language model that the adapter serves, on its device.
        texts: documents, see `documents`, or a ready stream of batches.
        settings: how to train.
        tokenizer: needed for documents.
        start: gates to continue from (not changed); fresh ones by default.
        out_dir: folder for `metrics.jsonl` and `state.pt`; training resumes from the latter.
        save_every: steps between saves of `state.pt`; 0 for the end only.
        stop_after: stop (and save) at this step of the schedule, to be resumed later.
        progress: called with the metrics of each step.
        fields: those of GateTraining, instead of `settings` or on top of them.

    Raises:
        ValueError: a setting out of range, several lengths for a ready stream, sizes that do not
            fit, a model whose layers all slide, or a folder with another run or a damaged state.
        UnsupportedError: the adapter does not serve the model.

    Example:
        >>> train_write_gate(model, texts, tokenizer=tokenizer, steps=1500,
        ...                  target_keep=0.25).save("gate.safetensors")  # doctest: +SKIP

    Source: EMCLab-Sinica/WG-KV, `scripts/train.py`.
    """
    told = GateTraining(**fields) if settings is None else attrs.evolve(settings, **fields)
    steps, window, threshold, lam = told.steps, told.window, told.threshold, told.lam
    if all(layer.window is not None for layer in attention_layers(model)):
        raise ValueError("model: every layer uses a sliding window, there is nothing to gate")
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    rank, processes = accelerator.process_index, accelerator.num_processes
    streams = _streams(texts, tokenizer, told, processes)
    least = sum(window / mix.length for mix, _ in streams) / len(streams)
    if told.target_keep is not None and told.target_keep <= least:
        raise ValueError(
            f"target_keep: wanted more than window / length = {least:.3g}, got {told.target_keep}"
        )
    gates = _fresh_gates(model, told.expand, told.seed)
    if start is not None:
        gates.load_state_dict(start.state_dict())
    for layer in gates.layers:
        layer.only(told.inputs)  # type: ignore[operator]  # a GatePredictor
    steer = None if told.target_keep is None else KeepController(target=told.target_keep)
    if steer is not None:
        steer.log_lam = math.log(told.start_lam)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=told.lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    parts: dict[str, Stateful] = {"gates": gates, "optimizer": optimizer, "schedule": schedule}
    if steer is not None:
        parts["controller"] = steer
    made_with = attrs.asdict(told, filter=lambda field, _: field.name not in _FREE) | {
        "model": keys_fingerprint(model),
        "length": [mix.length for mix, _ in streams],
        "processes": processes,
    }
    run = Run(out_dir, main=accelerator.is_main_process, settings=made_with, parts=parts)
    step, more = run.load()
    keep = more.get("keep", float("nan"))

    with attach_for_training(model, checkpointing=told.checkpointing) as attached:
        while step < min(steps, stop_after or steps):
            began = time.perf_counter()
            mix, size = streams[step % len(streams)]
            batch = mix.batch(step, size, rank=rank)
            ids = batch.input_ids.to(model.device)
            weight = cast(float, lam if steer is None else steer.lam)
            with torch.no_grad():
                teacher = attached.hidden(ids)
            student = gated_forward(
                attached, gates, ids, window=window, kernel=told.kernel,
                ungated=told.ungated, seed=(told.seed * steps + step) * processes + rank,
            )  # fmt: skip
            loss = distillation_loss(student.hidden, teacher)
            share = told.answer_share
            asked = answer_loss(student.hidden, teacher, batch.answers) if share else None
            if asked is not None:
                loss = (1 - share) * loss + share * asked
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
            if told.eval_every and step % told.eval_every == 0:
                metrics["hard"] = _hard(attached, gates, model, streams, told)._asdict()
            run.log(metrics)
            if progress is not None:
                progress(metrics)
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
    told: GateTraining,
    processes: int,
) -> list[Stream]:
    """A stream of sequences for each length, and how many of them make a step."""
    lengths, size = told.length, told.batch_size
    if isinstance(texts, TrainingMix):
        if len(lengths) > 1:
            raise ValueError(f"length: a ready stream has its own, got {list(lengths)}")
        return [(texts, size)]
    longest = max(lengths)
    sequences = told.steps * size * processes
    kinds = MIXES[told.mix]
    mix = as_mix(texts, tokenizer, longest, told.seed, sequences=sequences, kinds=kinds)
    return [(attrs.evolve(mix, length=n), size * longest // n) for n in lengths]


def _fresh_gates(model: PreTrainedModel, expand: float, seed: int) -> WriteGates:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WriteGates.for_model(model, expand)


def _hard(
    attached: AttachedModel,
    gates: WriteGates,
    model: PreTrainedModel,
    streams: list[Stream],
    told: GateTraining,
) -> Evaluation:
    batches = [
        tuple(mix.batch(n, size, rank=_HELD_OUT_RANK)) for n, (mix, size) in enumerate(4 * streams)
    ]
    return evaluate_gates(
        attached,
        gates,
        model.get_output_embeddings(),
        batches,  # type: ignore[arg-type]
        window=told.window,
        threshold=told.threshold,
        kernel=told.kernel,
    )
