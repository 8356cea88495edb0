"""Times of the cache's kernels in decode steps: of a model, and of a Llama of its sizes."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

from ..admission import LocalAttention
from ..pipeline import CachePipeline
from .context import Bench
from .families import FAMILIES, built

LENGTHS = (8000, 32000)  # within a chunk of Llama 4, of which little is left
READ = 8192  # columns of a forward with a pipeline
WINDOW, PROFILED = 256, 8


def kernels(bench: Bench, model: Any, cache: Any) -> dict[str, float]:
    """Microseconds a step of each of this library's kernels."""
    from ..adapters.hf.capture import Stepper

    if bench.device.type != "cuda":
        return {}
    names = _names()
    position = torch.full((1, 1), cache.columns, device=bench.device)
    stepper = Stepper(model, cache, position, PROFILED + 8)
    token = torch.full((1,), 21, device=bench.device)
    active = torch.ones(1, dtype=torch.bool, device=bench.device)
    with torch.no_grad():
        for _ in range(4):
            stepper.step(token, active)
        torch.cuda.synchronize()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
            for _ in range(PROFILED):
                stepper.step(token, active)
            torch.cuda.synchronize()
        stepper.finish(0)
    found: dict[str, float] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name in names:
            took = event.time_range.elapsed_us() / PROFILED
            found[event.name] = found.get(event.name, 0.0) + took
    return found


def _names() -> set[str]:
    """Of every kernel of the library."""
    from .. import kernels as package

    found = set()
    for part in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{part.name}")
        found |= {x.fn.__name__ for x in vars(module).values() if hasattr(x, "fn")}
    return {name for name in found if isinstance(name, str)}


def windows(model: Any) -> list[tuple[int | None, int | None]]:
    """Window and chunk of each layer with keys."""
    from ..adapters.hf import attach

    with attach(model, CachePipeline()) as attached:
        return [(sizes.window, sizes.chunk) for sizes in attached.spec.each]


def llama(bench: Bench, name: str, layers: list[tuple[int | None, int | None]]) -> dict[str, Any]:
    """Microseconds of the kernels of a Llama with the same heads, channels and stored tokens."""
    from transformers import LlamaConfig

    from ..adapters.hf import attach

    few: dict[str, Any] = dict(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    sizes = bench.pick(FAMILIES[name].sizes, few)
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4,
        num_attention_heads=heads, num_key_value_heads=sizes["num_key_value_heads"],
        head_dim=sizes.get("head_dim", hidden // heads), max_position_embeddings=1 << 17,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = built(bench, config)
    found: dict[str, Any] = {}
    for length in bench.pick(LENGTHS, (48,)):
        ids = torch.randint(20, 100, (1, length), device=bench.device)
        total, spans = 0.0, [length % chunk if chunk else window for window, chunk in layers]
        for window in set(spans):
            pipeline = CachePipeline(window=WINDOW)
            if window is not None:  # as many tokens as the layer that slides
                pipeline = CachePipeline(admission=LocalAttention(window=window, sinks=0))
            with attach(model, pipeline) as attached:
                cache = attached.read(ids, chunk_size=READ)
                a_layer = sum(kernels(bench, model, cache).values()) / config.num_hidden_layers
            total += a_layer * spans.count(window)
        found[f"llama {length}"] = total
    return found
