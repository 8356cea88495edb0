"""Training of DuoAttention head patterns: which KV heads need the full context.

Two published objectives. "duo" (mit-han-lab/duo-attention, `duo_attn/train.py`) mixes each
head's streaming output with the teacher's full output and counts answer tokens only. "wgkv"
(EMCLab-Sinica/WG-KV, `src/modeling_layers.py`) mixes with the student's own full output and
counts every token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from ..adapters.hf.fingerprints import keys_fingerprint
from ..adapters.hf.models import attention_layers, managed_sizes
from ..adapters.hf.training import AttachedModel, Attended, attach_for_training
from ..adapters.hf.training_attention import attend
from ..admission import _duo_file
from .data import Texts, TrainingMix, as_mix
from .objective import distillation_loss
from .run import Progress, Run, Stateful, average_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Objective = Literal["duo", "wgkv"]
_ANSWERED = {"codes": 0.6, "facts": 0.2, "pairs": 0.2}  # kinds of data that have answers


@attrs.frozen(kw_only=True)
class TrainedPattern:
    """How much each KV head needs the full context.

    Attributes:
        heads: `[L, Hkv]` in [0, 1]; 1 needs everything, 0 only sinks and recent tokens.
        sink_size: first tokens that streaming heads keep.
        recent_size: recent tokens that streaming heads keep, the token itself included.
        config: the other settings, for the record.
    """

    heads: Tensor = attrs.field(eq=False)
    sink_size: int
    recent_size: int
    config: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write the published layout: `full_attention_heads.tsv` and `config.json`."""
        config = {"sink_size": self.sink_size, "recent_size": self.recent_size, **self.config}
        _duo_file.write(Path(folder), self.heads.tolist(), config)


def train_duo_attention(
    model: PreTrainedModel,
    texts: Texts | TrainingMix,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    steps: int,
    objective: Objective = "duo",
    sink_size: int = 128,
    recent_size: int = 256,
    lam: float | None = None,
    length: int = 4096,
    batch_size: int = 1,
    seed: int = 0,
    checkpointing: bool = True,
    out_dir: str | Path | None = None,
    save_every: int = 0,
    stop_after: int | None = None,
    progress: Progress | None = None,
) -> TrainedPattern:
    """Train one weight per KV head of a frozen model.

    Under `accelerate launch` every process takes its own batches and gradients are averaged.

    Args:
        model: a causal language model that the adapter serves, on its device.
        texts: documents, see `documents`, or a ready stream of batches; "duo" needs kinds that
            have answers.
        tokenizer: needed for documents.
        steps: optimiser steps.
        objective: "duo": weights start at 1 and are clamped, AdamW 0.02 with 20 % ramps up and
            down, regulariser 0.05. "wgkv": sigmoid of 0, AdamW 0.2 with 10 %
            warm-up and a cosine, regulariser 0.05.
        sink_size: first tokens that streaming heads see.
        recent_size: recent tokens that streaming heads see, the token itself included.
        lam: weight of the mean head weight in the loss, instead of 0.05.
        length: tokens of a training sequence, for documents.
        batch_size: sequences a step and process.
        seed: of the data.
        checkpointing: recompute activations layer by layer.
        out_dir: folder for `metrics.jsonl` and `state.pt`; training resumes from the latter.
        save_every: steps between saves of `state.pt`; 0 for the end only.
        stop_after: stop (and save) at this step of the schedule, to be resumed later.
        progress: called with the metrics of each step.

    Raises:
        ValueError: an unknown objective, sizes that leave nothing to drop, for "duo" a batch
            without answers, or a folder with another run or a damaged state.
        UnsupportedError: the adapter does not serve the model.
    """
    if objective not in ("duo", "wgkv"):
        raise ValueError(f"objective: wanted one of 'duo', 'wgkv', got {objective!r}")
    for name, value in (("steps", steps), ("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}: wanted at least 1, got {value}")
    duo, layers = objective == "duo", attention_layers(model)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    rank, most = accelerator.process_index, steps * batch_size * accelerator.num_processes
    kinds = _ANSWERED if duo else None
    mix = as_mix(texts, tokenizer, length, seed, sequences=most, kinds=kinds)
    if recent_size < 1 or sink_size < 0 or sink_size + recent_size >= mix.length:
        raise ValueError(
            f"sink_size, recent_size: wanted at least 0 and 1, together less than the length "
            f"{mix.length}, got {sink_size} and {recent_size}"
        )
    weight = 0.05 if lam is None else lam
    shape = (len(layers), managed_sizes(layers).kv_heads)
    heads = nn.Parameter(torch.full(shape, 1.0 if duo else 0.0, device=model.device))
    optimizer = torch.optim.AdamW([heads], lr=0.02 if duo else 0.2, weight_decay=0.0)
    schedule: torch.optim.lr_scheduler.LRScheduler
    if duo:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: _ramps(n, steps))
    else:
        schedule = get_cosine_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
    mask = _streaming_mask(mix.length, sink_size, recent_size, model.device)
    settings = {
        "model": keys_fingerprint(model), "objective": objective, "steps": steps,
        "sink_size": sink_size, "recent_size": recent_size, "lam": weight, "length": mix.length,
        "batch_size": batch_size, "seed": seed, "processes": accelerator.num_processes,
    }  # fmt: skip
    parts: dict[str, Stateful] = {
        "heads": nn.ParameterList([heads]), "optimizer": optimizer, "schedule": schedule
    }  # fmt: skip
    run = Run(out_dir, main=accelerator.is_main_process, settings=settings, parts=parts)
    step, _ = run.load()

    with attach_for_training(model, checkpointing=checkpointing) as attached:
        while step < min(steps, stop_after or steps):
            began = time.perf_counter()
            batch = mix.batch(step, batch_size, rank=rank)
            ids, answers = (t.to(model.device) for t in batch)
            if duo and not bool(batch.answers.any()):
                raise ValueError(
                    f'texts: wanted batches with answers for "duo", got none in {mix.length} '
                    "tokens; write length=1024 or more, or objective='wgkv', which needs none"
                )
            if duo:
                with torch.no_grad():
                    heads.clamp_(0, 1)
            share = heads if duo else heads.sigmoid()
            full: dict[int, Tensor] = {}
            with torch.no_grad():
                teacher = attached.hidden(ids, _recorder(full))
            student = _mixed(attached, ids, share, mask, full if duo else None)
            if duo:
                loss = distillation_loss(student[answers], teacher[answers])
            else:
                loss = distillation_loss(student, teacher)
            optimizer.zero_grad(set_to_none=True)
            (loss + weight * share.abs().mean()).backward()
            average_gradients(accelerator, [heads])
            optimizer.step()
            schedule.step()
            step += 1
            metrics = {
                "step": step,
                "loss": loss.item(),
                "heads": share.mean().item(),
                "seconds": round(time.perf_counter() - began, 4),
            }
            run.log(metrics)
            if progress is not None:
                progress(metrics)
            if save_every and step % save_every == 0:
                run.save(step)
        run.save(step)
    final = heads.detach().clamp(0, 1) if duo else heads.detach().sigmoid()
    return TrainedPattern(
        heads=final.float().cpu(),
        sink_size=sink_size,
        recent_size=recent_size,
        config={
            "objective": objective, "steps": step, "lambda": weight, "length": mix.length,
            "model": settings["model"],
        },
    )  # fmt: skip


def _ramps(step: int, steps: int) -> float:
    """Learning-rate factor: up over a fifth of the steps and down over the last, at least 0.1."""
    ramp = max(steps // 5, 1)
    return min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))


def _streaming_mask(length: int, sink: int, recent: int, device: torch.device) -> Tensor:
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & ((distance < recent) | (position[None, :] < sink))


def _recorder(full: dict[int, Tensor]) -> Callable[..., Tensor]:
    """Dense attention that keeps each layer's output for the student."""

    def rule(attended: Attended) -> Tensor:
        full[attended.call] = attended.dense()
        return full[attended.call]

    return rule


def _mixed(
    model: AttachedModel,
    ids: Tensor,
    share: Tensor,
    mask: Tensor,
    teacher: dict[int, Tensor] | None,
) -> Tensor:
    def rule(attended: Attended) -> Tensor:
        query, key = attended.query, attended.key
        streaming = _streaming(attended, mask)
        full = attended.dense() if teacher is None else teacher[attended.call]
        group = query.shape[1] // key.shape[1]
        part = share[attended.layer].repeat_interleave(group)[:, None, None].to(query.dtype)
        return part * full + (1 - part) * streaming

    return model.hidden(ids, rule)


def _streaming(attended: Attended, mask: Tensor) -> Tensor:
    """Attention of `mask` `[N, N]` alone."""
    query, key, value = attended.query, attended.key, attended.value
    scale, softcap, sinks = attended.scale, attended.softcap, attended.sinks
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
    hidden = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)

    def bias(distance: Tensor) -> Tensor:
        start = distance.shape[1] - distance.shape[0]
        return hidden[start : distance.shape[1], : distance.shape[1]]

    return attend(query, key, value, scale=scale, softcap=softcap, sinks=sinks, bias=bias)
