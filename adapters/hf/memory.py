"""What a cache will cost, from sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Unpack

import attrs
import torch
from torch import Tensor, nn

from ..._arguments import check_dtype, check_fraction, check_sizes_of, optional
from ..._fields import shown
from ...admission import Admission, Write
from ...budget import BudgetView, bound_layers
from ...pipeline import CachePipeline, is_pipeline
from ...spec import CacheSpec, Sizes
from ...store.plan import planned
from .fit_table import fit_table
from .sizes import spec_of
from .wrappers import base_of


@attrs.frozen
class Learned(Admission):
    """Stands for any learned admission."""

    def admit(self, write: Write) -> Tensor:
        raise NotImplementedError


@attrs.frozen(kw_only=True)
class FitReport:
    """Bytes that a model and a cache need after a prompt of `tokens` tokens a sequence.

    `pages` hold the global tokens that are left once the prompt has ended, `prompt_pages` those
    before a prompt-end eviction; `reserved` is the most that stays allocated beside them. `ring` is
    the local window with its rollback slots; `positions` and `summaries` belong to the pages,
    `tables` are page tables, counters and free stack, `queries` the observation windows, `numbers`
    those of tokens that an eviction asked for, `statistics` what evictions hold of queries before
    RoPE and of attention inputs. `weights`
    are the model's, `gates` the policies' own. `full` are K and V of all tokens (in layers that
    slide: of their windows), which is what an ordinary cache holds. `kept` is the fraction of
    tokens in the cache, window included. Activations are not counted. `print` shows a table.
    """

    tokens: int
    batch: int
    kept: float
    pages: int
    prompt_pages: int
    reserved: int
    ring: int
    positions: int
    summaries: int
    tables: int
    queries: int
    numbers: int
    statistics: int
    gates: int
    weights: int
    full: int

    @property
    def cache(self) -> int:
        """Everything that grows with tokens or sequences."""
        parts = (self.pages, self.reserved, self.ring, self.positions, self.summaries)
        return sum(parts) + self.tables + self.queries + self.numbers + self.statistics

    @property
    def total(self) -> int:
        """Weights, gates and cache."""
        return self.weights + self.gates + self.cache

    @property
    def full_total(self) -> int:
        """Weights and an ordinary cache."""
        return self.weights + self.full

    @property
    def saving(self) -> float:
        """The fraction of `full_total` that is not needed; negative if more is needed."""
        return 1 - self.total / self.full_total

    def __str__(self) -> str:
        return fit_table(self).text()

    def _repr_html_(self) -> str:
        return fit_table(self).html()


def fit_report(
    config_or_model: Any,
    tokens: int,
    admitted: float | None = None,
    pipeline: CachePipeline | None = None,
    batch: int = 1,
    dtype: torch.dtype | None = None,
    **sizes: Unpack[Sizes],
) -> FitReport:
    """Plans memory without running anything.

    Args:
        config_or_model: a transformers config (nothing is downloaded or allocated) or a model.
        tokens: real tokens of each sequence.
        admitted: fraction of the tokens that a learned admission admits, the same for every head.
        pipeline: what is written and dropped; by default an admission of the fraction `admitted`
            (all, if that is not given) and the default window.
        batch: sequences.
        dtype: of weights and cache; default the model's or config's own.
        sizes: `page_size`, `rollback`, `interval` of the cache.

    Raises:
        ValueError: `admitted` is out of range, or missing for a learned admission, or given where
            decisions follow from positions; a size is less than 1; a policy does not fit.

    Example:
        `fit_report(AutoConfig.from_pretrained(name), 100_000, admitted=0.2).total / 2**30`
    """
    check_sizes_of(tokens=tokens, batch=batch)
    optional(check_fraction, "admitted", admitted)
    optional(check_dtype, "dtype", dtype)
    if pipeline is not None:
        is_pipeline(pipeline)
    else:
        pipeline = CachePipeline(admission=Learned())
        admitted = 1.0 if admitted is None else admitted
    model, device = _model(config_or_model, dtype)
    spec = spec_of(model, dtype=dtype, device=device, **sizes)
    pipeline.check(spec)
    _check_admitted(pipeline, spec, admitted)
    written, left = global_tokens(pipeline, spec, tokens, admitted or 0.0)
    plan = planned(pipeline, spec, tokens, batch, written, left)
    windows = [spec.at(n).window or pipeline.window for n in range(spec.layers)]
    heads = [spec.at(n).kv_heads for n in range(spec.layers)]
    dims = [spec.at(n).head_dim + spec.at(n).value_dim for n in range(spec.layers)]
    dense = [min(tokens, spec.slides(n) or tokens) for n in range(spec.layers)]
    near = sum(min(tokens, w) * h for w, h in zip(windows, heads, strict=True))
    item = spec.dtype.itemsize
    policies = (pipeline.admission, pipeline.eviction)
    return FitReport(
        tokens=tokens,
        batch=batch,
        kept=(sum(map(sum, left)) + near) / (tokens * sum(heads)),
        gates=sum(t.numel() for policy in policies for t in _tensors(policy)) * item,
        weights=sum(p.numel() for p in model.parameters()) * item,
        full=batch * item * sum(n * h * d for n, h, d in zip(dense, heads, dims, strict=True)),
        **attrs.asdict(plan),
    )


def _model(
    config_or_model: Any, dtype: torch.dtype | None
) -> tuple[nn.Module, torch.device | None]:
    """A model to read sizes from, and the device that one of a config would run on."""
    if isinstance(config_or_model, nn.Module) and hasattr(base_of(config_or_model), "config"):
        return config_or_model, None
    from transformers import AutoModelForCausalLM, PreTrainedConfig

    if not isinstance(config_or_model, PreTrainedConfig):
        hint = "; load it: AutoConfig.from_pretrained(name)"
        raise TypeError(
            f"config_or_model: wanted a config or a model of transformers, got "
            f"{shown(config_or_model)}{hint if isinstance(config_or_model, str) else ''}"
        )
    config: Any = config_or_model
    with torch.device("meta"):
        dtype = dtype or config.dtype or torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, torch.device("cuda")


def _check_admitted(pipeline: CachePipeline, spec: CacheSpec, admitted: float | None) -> None:
    deciding = [pipeline.admission.at(n) for n in range(spec.layers)]
    marking = [pipeline.eviction.at(n).admission for n in range(spec.layers)]
    deciding += [admission for admission in marking if admission is not None]
    learned = [type(p).__name__ for p in deciding if not p.by_position]
    if learned and admitted is None:
        raise ValueError(
            f"admitted: wanted the fraction of tokens that {learned[0]} admits, got None; it "
            "depends on the text: write admitted=0.25 for a quarter, or what report().mean_admitted"
            " says after a text of yours"
        )
    if not learned and admitted is not None:
        raise ValueError(
            f"admitted: what {type(deciding[0]).__name__} admits follows from positions; wanted "
            f"None, got {admitted}"
        )


def global_tokens(
    pipeline: CachePipeline, spec: CacheSpec, tokens: int, admitted: float
) -> tuple[list[list[int]], list[list[int]]]:
    """Global tokens `[L][Hkv]` of a sequence: written, and left when the prompt has ended."""
    written = [[0] * spec.at(layer).kv_heads for layer in range(spec.layers)]
    left = [list(heads) for heads in written]
    far = max(tokens - pipeline.window, 0)
    managed = [layer for layer in range(spec.layers) if spec.slides(layer) is None]
    evictions = {layer: pipeline.eviction.at(layer) for layer in managed}
    for layer, eviction in evictions.items():
        written[layer] = _count(pipeline.admission.at(layer), spec, layer, far, admitted)
        left[layer] = written[layer]
        if eviction.admission is not None:
            marked = _count(eviction.admission, spec, layer, far, admitted)
            left[layer] = [min(pair) for pair in zip(left[layer], marked, strict=True)]
    for budget, layers in bound_layers(evictions):
        counts = [[left[layer] for layer in layers]]
        view = BudgetView(
            seen=(tokens,),
            window=pipeline.window,
            layers=tuple(layers),
            of=spec.layers,
            kv_heads=tuple(spec.at(layer).kv_heads for layer in layers),
            counts=lambda counts=counts: counts,  # type: ignore[misc]
        )
        for layer, targets in zip(layers, budget.targets(view)[0], strict=True):
            left[layer] = [min(pair) for pair in zip(left[layer], targets, strict=True)]
    return written, left


def _count(
    admission: Admission, spec: CacheSpec, layer: int, far: int, admitted: float
) -> list[int]:
    """Tokens that each head of a layer admits of the first `far`."""
    heads, dim = spec.at(layer).kv_heads, spec.at(layer).head_dim
    if not admission.by_position:
        return [round(admitted * far)] * heads
    keys = torch.zeros(1).expand(heads, far, dim)
    bounds = torch.tensor([0, far], dtype=torch.int32)
    ids = range(spec.head_offset, spec.head_offset + heads)
    write = Write(keys, keys, torch.arange(far), bounds, layer, ids)
    counts: list[int] = admission.admit(write).sum(1).tolist()
    return counts


def _tensors(policy: Any) -> Iterator[Tensor]:
    """Every tensor inside a policy, through combinators and per-layer maps."""
    if isinstance(policy, Tensor):
        yield policy
    elif isinstance(policy, tuple):
        for member in policy:
            yield from _tensors(member)
    elif attrs.has(type(policy)):
        for field in attrs.fields(type(policy)):
            yield from _tensors(getattr(policy, field.name))
