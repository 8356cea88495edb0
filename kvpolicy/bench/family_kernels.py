"""Times of the cache's kernels in decode steps: of a model, and of a Llama of its sizes."""

from __future__ import annotations

import functools
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
    """Microseconds a step in which each of this library's kernels ran, and in "all" any of them.

    A kernel that is launched before another has ended waits inside for it.
    """
    from ..adapters.hf.capture import Stepper

    if bench.device.type != "cuda":
        return {}
    names = kernel_names()
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
    spans: dict[str, list[tuple[float, float]]] = {"all": []}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name in names:
            span = event.time_range.start, event.time_range.end
            spans["all"].append(span)
            spans.setdefault(event.name, []).append(span)
    return {name: _covered(each) / PROFILED for name, each in spans.items()}


def _covered(spans: list[tuple[float, float]]) -> float:
    """How long at least one of them lasted."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def kernel_names() -> set[str]:
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


def _copy(target: torch.Tensor, source: torch.Tensor, *given: Any) -> None:
    target.copy_(source)


def copies(sizes: dict[str, Any]) -> int:
    """Bytes of weights that the chosen experts of a token copy, and leave to be written back."""
    if "num_experts_per_tok" not in sizes:
        return 0
    inner = sizes.get("moe_intermediate_size", sizes["intermediate_size"])
    return int(2 * 3 * inner * sizes["hidden_size"] * sizes["num_experts_per_tok"])


def llama(bench: Bench, name: str, layers: list[tuple[int | None, int | None]]) -> dict[str, Any]:
    """Microseconds of the kernels of a Llama with the same heads, channels and stored tokens.

    Beside a mixture of experts, in layers that copy as much as the experts do: what lies in the L2
    to be written back slows what is read next.
    """
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
    model, copied = built(bench, config), copies(FAMILIES[name].sizes)
    if copied and not bench.quick:
        source = torch.empty(copied, dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(functools.partial(_copy, target, source))
    found: dict[str, Any] = {"copied": copied}
    for length in bench.pick(LENGTHS, (48,)):
        ids = torch.randint(20, 100, (1, length), device=bench.device)
        total, spans = 0.0, [length % chunk if chunk else window for window, chunk in layers]
        for window in set(spans):
            pipeline = CachePipeline(window=WINDOW)
            if window is not None:  # as many tokens as the layer that slides
                pipeline = CachePipeline(admission=LocalAttention(window=window, sinks=0))
            with attach(model, pipeline) as attached:
                cache = attached.read(ids, chunk_size=READ)
                a_layer = kernels(bench, model, cache).get("all", 0.0) / config.num_hidden_layers
            total += a_layer * spans.count(window)
        found[f"llama {length}"] = total
    return found
