"""Model types beside their own attention in float64: a padded batch, chunks, captured steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from ..budget import Tokens
from ..eviction import SnapKV
from ..pipeline import CachePipeline
from ..selection import Quest
from .context import Bench
from .families import build
from .gates import random_gate

LIMIT = 2.0  # times the error of the model's own attention
PADDING = (0, 37, 301)  # columns of each row
STEPS, SEEN, LEAST = 40, 16, 700  # decoded tokens, compared prompt tokens, tokens of a prompt
OWN_CHUNK = 256  # columns of a plain forward, whose scores are held whole
NAME = "kvpolicy_bench_exact"


def _exact(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Eager attention as it is meant, every operation in the query's dtype."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scale = given.get("scaling")
    logits = (query @ key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if given.get("softcap") is not None:
        logits = torch.tanh(logits / given["softcap"]) * given["softcap"]
    if mask is not None:
        logits = logits + mask[:, :, :, : key.shape[2]].to(logits)
    sinks = given.get("s_aux")
    if sinks is None:
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None
    sinks = sinks.to(logits).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


def checks(bench: Bench, name: str, told: Callable[[dict[str, Any]], None]) -> None:
    """Tells, in each dtype, how far logits are from the exact ones, and how decoding went."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _exact)
    AttentionMaskInterface.register(NAME, eager_mask)
    model = build(bench, name, narrow=True, attention="eager")
    case = _case(bench, model)
    _cast(model, torch.float64)
    model.set_attn_implementation(NAME)
    exact = list(_own(model, case))
    model.set_attn_implementation("eager")
    for dtype in (torch.float32, bench.dtype):
        _cast(model, dtype)
        own = list(_own(model, case))
        found, decoding, _ = _attached(model, case, CachePipeline(window=case.window))
        far = [_error(x, exact) for x in (found, own)]
        told({
            "name": str(dtype).removeprefix("torch."), "error": far[0], "own error": far[1],
            "ratio": far[0] / max(far[1], torch.finfo(dtype).eps), "decoding": decoding,
            "tokens": case.ids.shape[1], "padded": not bool(case.mask.all()),
        })  # fmt: skip
        told(_policies(bench, model, case) | {"dtype": str(dtype).removeprefix("torch.")})


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Weights, which were made in 16 bits; buffers such as RoPE's frequencies stay as they are."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


@attrs.frozen(kw_only=True, eq=False)
class _Case:
    """Rows `ids` `[B, prompt + STEPS]`, padded on the left where `mask` is 0."""

    ids: Tensor
    mask: Tensor
    prompt: int
    window: int
    whole: bool  # whether later forwards of several columns are not for this model


def _case(bench: Bench, model: Any) -> _Case:
    from ..adapters.hf.models import served
    from ..adapters.hf.rule.kinds import layer_kinds

    kinds = layer_kinds(model.config)
    reach = max([kind.window or kind.chunk or 1 for kind in kinds])
    prompt = max(reach - STEPS // 2 + PADDING[1], bench.pick(LEAST, 24))
    padding = bench.pick(PADDING, (0, 3, 7))
    probe = served(model).probe
    if probe.counts and prompt + STEPS >= probe.counts_from:  # where padded rows are refused
        padding = (0, 0, 0)
    generator = torch.Generator().manual_seed(1)
    high = model.config.get_text_config().vocab_size
    ids = torch.randint(20, min(high, 140), (3, prompt + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    for row, columns in enumerate(padding):
        mask[row, :columns] = 0
    own = any(kind.own for kind in kinds)
    return _Case(
        ids=ids.to(bench.device), mask=mask.to(bench.device), prompt=prompt,
        window=bench.pick(64, 5), whole=own,
    )  # fmt: skip


@torch.no_grad()
def _own(model: Any, case: _Case) -> Iterator[Tensor]:
    """Logits `[SEEN + STEPS, V]` of each row alone, by the model without a pipeline."""
    from transformers import DynamicCache

    _experts(model, "eager")
    for row, mask in zip(case.ids, case.mask, strict=True):
        ids = row[mask.bool()][None]
        cache, parts = DynamicCache(config=model.config), []
        size = ids.shape[1] if case.whole else OWN_CHUNK
        for part in ids.split(size, 1):
            keep = min(part.shape[1], SEEN + STEPS)
            out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=keep)
            parts.append(out.logits[0].double())
        yield torch.cat(parts)[-SEEN - STEPS :]


@torch.no_grad()
def _attached(
    model: Any, case: _Case, pipeline: CachePipeline, **sizes: Any
) -> tuple[list[Tensor], str, list[set[int]]]:
    """The same of the padded batch with `pipeline`, how its steps ran, and what it kept."""
    from ..adapters.hf import attach
    from ..adapters.hf.capture import Stepper

    rows, columns = case.ids.shape
    places = (case.mask.cumsum(1) - 1).clamp(min=0)
    with attach(model, pipeline, **sizes) as attached:
        cache, parts = attached.new_cache(), []
        _experts(model, "eager")
        cuts = [0, case.prompt] if case.whole else [0, *range(257, case.prompt, 3001), case.prompt]
        for start, stop in itertools.pairwise(cuts):
            logits = model(
                input_ids=case.ids[:, start:stop], attention_mask=case.mask[:, :stop],
                past_key_values=cache, use_cache=True, logits_to_keep=min(SEEN, stop - start),
            ).logits  # fmt: skip
        parts.append(logits)
        assert logits.shape[1] == SEEN
        cache.end_prompt()
        _experts(model, "batched_mm")  # which waits for nothing
        stepper = Stepper(model, cache, places[:, case.prompt, None], STEPS + 1)
        active = torch.ones(rows, dtype=torch.bool, device=case.ids.device)
        for column in range(case.prompt, columns):
            parts.append(stepper.step(case.ids[:, column], active).clone())
        stepper.finish(0)
        found = torch.cat(parts, 1).double()
        return list(found), cache.decoding, _kept(cache.state)


def _kept(state: Any) -> list[set[int]]:
    """Positions in the cache, of each head of the layers that policies manage."""
    return [
        set(state.kept(layer, row, head).tolist())
        for layer in state.spec.managed
        for row in range(state.batch)
        for head in range(state.spec.at(layer).kv_heads)
    ]


def _policies(bench: Bench, model: Any, case: _Case) -> dict[str, Any]:
    """Gate, Quest and SnapKV at once, by the kernels and by the reference on the same device."""
    from ..adapters.hf import attach

    dtype = next(model.parameters()).dtype
    with attach(model, CachePipeline()) as attached:
        spec = attached.spec
    gate = random_gate(
        spec.layers, spec.kv_heads, 32, spec.head_dim, case.window, bench.device
    )  # fmt: skip
    least = 2 * case.window + 16
    parts: dict[str, Any] = dict(
        window=case.window, admission=gate, selection=Quest(budget=Tokens(least)),
        eviction=SnapKV(budget=Tokens(2 * least), observation=min(case.window, 16)),
    )  # fmt: skip
    found, decoding, kept = _attached(model, case, CachePipeline(**parts))
    told: dict[str, Any] = {
        "name": "gate + Quest + SnapKV", "decoding": decoding, "error": None, "ratio": None,
        "kept": 0, "other": 0, "finite": all(bool(x.isfinite().all()) for x in found),
    }  # fmt: skip
    if dtype == torch.float32 and bench.device.type == "cuda":
        wanted, _, same = _attached(model, case, CachePipeline(**parts, backend="reference"))
        told["kept"] = sum(map(len, same))
        told["other"] = sum(len(a ^ b) // 2 for a, b in zip(kept, same, strict=True))
        # Where rounding decides that another token is kept, logits say no more.
        told["error"] = _error(found, wanted)
    return told


def _experts(model: Any, name: str) -> None:
    """How a mixture's experts are computed, where the model has a choice."""
    if getattr(model, "_can_set_experts_implementation", lambda: False)():
        model.set_experts_implementation(name)


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative, over all rows: where rounding sends a token to another expert, one is far off."""
    a, b = torch.stack(found), torch.stack(wanted)
    return float((a - b).norm() / b.norm())
