"""End to end: a model of Llama-3.1-8B's shape with random weights, prompt and captured decoding."""

from __future__ import annotations

import gc
import time
from typing import Any

import attrs
import torch
from torch import Tensor

from ..budget import Tokens
from ..pipeline import CachePipeline
from ..selection import Quest
from .context import Bench
from .gates import FixedFraction, random_gate
from .launches import profiled

FRACTION = 0.25
CHUNK, STEPS, EAGER, PROFILED = 16384, 300, 8, 18


def build(bench: Bench) -> Any:
    """The model, made once a run, directly on the device in bfloat16."""
    if "model" not in bench.shared:
        from transformers import LlamaConfig, LlamaForCausalLM

        full: dict[str, Any] = dict(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        )  # fmt: skip
        tiny: dict[str, Any] = dict(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        )  # fmt: skip
        config = LlamaConfig(
            **bench.pick(full, tiny), max_position_embeddings=1 << 20,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(bench.dtype)
        try:
            with bench.device:
                bench.shared["model"] = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    return bench.shared["model"]


def pipelines(bench: Bench, kind: str, tokens: int) -> CachePipeline:
    """ "gate", "gate + Quest" or "dense"."""
    window = bench.pick(256, 8)
    if kind == "dense":
        return CachePipeline(window=window)
    config = build(bench).config
    gate = random_gate(
        config.num_hidden_layers, config.num_key_value_heads, bench.pick(512, 16), config.head_dim,
        window, bench.device,
    )  # fmt: skip
    admission = FixedFraction.of(gate, FRACTION, tokens + 2 * STEPS)
    if kind == "gate":
        return CachePipeline(admission=admission)
    return CachePipeline(admission=admission, selection=Quest(budget=Tokens(bench.pick(4096, 24))))


@attrs.define
class Found:
    """What one prompt and its continuation cost."""

    ttft: float = 0.0  # s
    first_ttft: float = 0.0
    weights: int = 0  # bytes
    resident: int = 0  # allocated beside the weights after the prompt
    peak: int = 0
    report: Any = None
    tpot: float = 0.0  # ms
    eager: float | None = None
    steps: int = 0
    captures: int = 0
    decoding: str = ""
    counts: dict[str, int] = attrs.field(factory=dict)


def prefill(model: Any, cache: Any, ids: Tensor, chunk: int) -> Tensor:
    """Runs the prompt `ids` `[B, S]` in chunks; the first new token `[B]`."""
    for part in ids.split(max(chunk // ids.shape[0], 1), dim=1):
        logits = model(
            input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
    cache.end_prompt()
    return logits[:, -1].argmax(-1)


@torch.no_grad()
def measure(bench: Bench, kind: str, tokens: int, batch: int, eager: bool) -> Found:
    """TTFT from token ids to the first token, then TPOT over consecutive steps with sampling."""
    from ..adapters.hf import attach

    model, found = build(bench), Found()
    pipeline = pipelines(bench, kind, tokens)
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens), device=bench.device)
    found.weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with attach(model, pipeline) as attachment:
        prefill(model, attachment.new_cache(), ids[:, : bench.pick(2048, 16)], bench.pick(1024, 8))
        cache: Any = None
        for attempt in range(2):
            del cache
            before = _clean(bench)
            cache = attachment.new_cache()
            start = time.perf_counter()
            token = prefill(model, cache, ids, bench.pick(CHUNK, 40))
            token.tolist()
            found.ttft = time.perf_counter() - start
            found.first_ttft = found.first_ttft or found.ttft
            bench.say(f"  {kind} {batch} x {tokens}: prompt {found.ttft:.2f} s")
            if bench.left() < 2 * found.ttft + 20 or attempt:
                break
        if bench.device.type == "cuda":
            found.peak = torch.cuda.max_memory_allocated() - before + found.weights
            found.resident = torch.cuda.memory_allocated() - before
        found.report = cache.report()
        _decode(bench, model, cache, token, eager, found)
        del cache
    _clean(bench)
    return found


def _decode(bench: Bench, model: Any, cache: Any, token: Tensor, eager: bool, found: Found) -> None:
    from ..adapters.hf.capture import Stepper, run

    batch, position = token.shape[0], torch.full_like(token[:, None], cache.columns)
    steps = bench.pick(STEPS if batch == 1 else STEPS // 3, 4)
    stepper = Stepper(model, cache, position, steps + EAGER + PROFILED + 16)
    active = torch.ones(batch, dtype=torch.bool, device=bench.device)

    def decode(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = stepper.step(token, active)[:, -1].argmax(-1)

    decode(bench.pick(4, 1))  # eager steps, then capture
    _wait(bench)
    start = time.perf_counter()
    decode(steps)
    _wait(bench)
    found.tpot = 1e3 * (time.perf_counter() - start) / steps
    found.steps, found.decoding, found.captures = steps, cache.decoding, cache.captures
    if stepper.captured:
        with profiled() as counts:
            decode(PROFILED)
        found.counts = dict(counts)
    stepper.finish()
    if eager:
        start = time.perf_counter()
        for _ in range(EAGER):
            logits = run(model, cache, token[:, None], stepper.position)
            stepper.position = stepper.position + 1
            token = logits[:, -1].argmax(-1)
        _wait(bench)
        found.eager = 1e3 * (time.perf_counter() - start) / EAGER


def _wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def _clean(bench: Bench) -> int:
    """Gives memory back and restarts the peak; bytes that are still allocated."""
    gc.collect()
    if bench.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
