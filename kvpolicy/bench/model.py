"""End to end: models with random weights, prompt and captured decoding through compiled layers."""

from __future__ import annotations

import gc
import time
from typing import Any

import attrs
import torch
from torch import Tensor

from ..budget import Tokens
from ..eviction import KeepAll, SnapKV
from ..pipeline import CachePipeline
from ..selection import Quest, SelectAll
from .context import Bench
from .gates import FixedFraction, random_gate
from .launches import profiled
from .ranks import made, split

FRACTION = 0.25
CHUNK, STEPS, EAGER, PROFILED = 50_000, 300, 8, 18
QUEST, SNAPKV = 4096, 16384  # budgets in tokens a KV head
TWICE = 128_000  # tokens of a batch up to which a prompt is timed twice

SIZES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ),
    "Llama-3.1-70B, 20 layers": dict(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=20,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    ),
    "Qwen3-4B": dict(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
}  # fmt: skip
SHAPES = ("Llama-3.1-8B", "Qwen3-4B")
LARGE = "Llama-3.1-70B, 20 layers"  # a quarter of its depth


@attrs.frozen(kw_only=True)
class Setting:
    """What one measurement runs: `policy` is "gate", "gate + Quest", "gate + SnapKV" or "dense"."""

    policy: str
    tokens: int
    batch: int = 1
    shape: str = SHAPES[0]
    fraction: float = FRACTION  # admitted by the gate
    ranks: int = 1  # that share the heads

    def __str__(self) -> str:
        name = f"{self.policy}, {self.tokens // 1000}K"
        if self.policy != "dense" and self.fraction != FRACTION:
            name += f", {100 * self.fraction:.0f} % admitted"
        if self.batch > 1:
            name += f", batch {self.batch}"
        if self.ranks > 1:
            name += f", TP {self.ranks}"
        return name if self.shape == SHAPES[0] else f"{self.shape} {name}"


def build(bench: Bench, shape: str) -> Any:
    """The model, made once a run, directly on the device in bfloat16."""
    if ("model", shape) not in bench.shared:
        import transformers

        tiny: dict[str, Any] = dict(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        )  # fmt: skip
        family = "Qwen3" if shape.startswith("Qwen3") else "Llama"
        config = getattr(transformers, f"{family}Config")(
            **SIZES[shape] | bench.pick({}, tiny), max_position_embeddings=1 << 20,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        make = getattr(transformers, f"{family}ForCausalLM")
        own = make, config, bench.dtype, bench.device
        bench.shared["model", shape] = made(*own) if bench.ranks == 1 else split(*own)
    return bench.shared["model", shape]


def pipeline_of(bench: Bench, setting: Setting) -> CachePipeline:
    """The policies of a setting, with a write gate of random weights."""
    window = bench.pick(256, 8)
    if setting.policy == "dense":
        return CachePipeline(window=window)
    config = build(bench, setting.shape).config
    gate = random_gate(
        config.num_hidden_layers, config.num_key_value_heads, bench.pick(512, 16), config.head_dim,
        window, bench.device,
    )  # fmt: skip
    quest, snapkv = Tokens(bench.pick(QUEST, 24)), Tokens(bench.pick(SNAPKV, 24))
    return CachePipeline(
        admission=FixedFraction.of(gate, setting.fraction, setting.tokens + 2 * STEPS),
        selection=Quest(budget=quest) if setting.policy == "gate + Quest" else SelectAll(),
        eviction=SnapKV(budget=snapkv, observation=window)
        if setting.policy == "gate + SnapKV"
        else KeepAll(),
    )


@attrs.define
class Found:
    """What one prompt and its continuation cost."""

    ttft: float = 0.0  # s
    first_ttft: float = 0.0
    chunk: int = 0  # tokens of the longest chunk
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
    """Runs the prompt `ids` `[B, S]` in equal chunks of up to `chunk` tokens; the first new token.

    A short last chunk costs more than its share.
    """
    batch, columns = ids.shape
    for part in ids.tensor_split(_chunks(batch, columns, chunk), dim=1):
        logits = model(
            input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
    cache.end_prompt()
    return logits[:, -1].argmax(-1)


def _chunks(batch: int, columns: int, chunk: int) -> int:
    """How many equal chunks of up to `chunk` tokens a prompt has."""
    return -(-columns // max(chunk // batch, 1))


@torch.no_grad()
def measure(bench: Bench, setting: Setting) -> Found:
    """TTFT from token ids to the first token, then TPOT over consecutive steps with sampling."""
    from ..adapters.hf import attach

    model, found = build(bench, setting.shape), Found()
    shape = setting.batch, bench.pick(setting.tokens, 96)
    ids = torch.randint(1, model.config.vocab_size, shape, device=bench.device)
    found.chunk = shape[0] * -(-shape[1] // _chunks(*shape, bench.pick(CHUNK, 40)))
    found.weights = sum(p.numel() * p.element_size() for p in model.parameters())
    compiled = not bench.quick  # tiny shapes would spend minutes in the compiler
    with attach(model, pipeline_of(bench, setting), compile=compiled) as attachment:
        warm_up(bench, setting, model, attachment, ids)
        cache: Any = None
        for attempt in range(2):
            del cache
            before = clean(bench)
            cache = attachment.new_cache()
            start = time.perf_counter()
            token = prefill(model, cache, ids, bench.pick(CHUNK, 40))
            token.tolist()
            found.ttft = time.perf_counter() - start
            found.first_ttft = found.first_ttft or found.ttft
            bench.say(f"  {setting}: prompt {found.ttft:.2f} s")
            once = setting.batch * setting.tokens > TWICE
            if attempt or once or bench.left() < 2 * found.ttft + 20:
                break
        if bench.device.type == "cuda":
            found.peak = torch.cuda.max_memory_allocated() - before + found.weights // bench.ranks
            found.resident = torch.cuda.memory_allocated() - before
        found.report = cache.report(all_ranks=True)
        _decode(bench, model, cache, token, found)
        del cache
    clean(bench)
    return found


def warm_up(bench: Bench, setting: Setting, model: Any, attachment: Any, ids: Tensor) -> None:
    """Two whole chunks of a kind that the run has not seen: some prompts are timed only once."""
    whole = ids[:, : 2 * bench.pick(CHUNK, 8) // setting.batch]
    kind = "warm", setting.policy, setting.shape, setting.batch > 1, whole.numel()
    chunk = bench.pick(2048 if kind in bench.shared else CHUNK, 8)
    prefill(model, attachment.new_cache(), whole[:, : 2 * chunk // setting.batch], chunk)
    bench.shared[kind] = True


def _decode(bench: Bench, model: Any, cache: Any, token: Tensor, found: Found) -> None:
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
    wait(bench)
    start = time.perf_counter()
    decode(steps)
    wait(bench)
    found.tpot = 1e3 * (time.perf_counter() - start) / steps
    found.steps, found.decoding, found.captures = steps, cache.decoding, cache.captures
    if stepper.captured:
        with profiled() as counts:
            decode(PROFILED)
        found.counts = dict(counts)
    stepper.finish(extra=0)
    if batch == 1 and cache.columns <= TWICE:
        start = time.perf_counter()
        for _ in range(EAGER):
            logits = run(model, cache, token[:, None], stepper.position)
            stepper.position = stepper.position + 1
            token = logits[:, -1].argmax(-1)
        wait(bench)
        found.eager = 1e3 * (time.perf_counter() - start) / EAGER


def wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def clean(bench: Bench) -> int:
    """Gives memory back and restarts the peak; bytes that are still allocated."""
    gc.collect()
    if bench.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
