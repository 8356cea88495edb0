"""Fast KVzip: a gate on the attention input that predicts KVzip's scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from .._fields import check_floats, is_a, not_negative
from .._files import read_pt, write_pt
from .._names import named
from ..admission import Write
from ..admission._files import Source, located, source_field
from ..admission._products import by_tile
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ._base import Eviction, when_field
from ._view import EvictionView

_EPS = 1e-6
# Name in the file, name of the field.
_NAMES = {
    "q_proj.weight": "q",
    "q_proj.bias": "q_bias",
    "k_proj.weight": "k",
    "q_norm.weight": "q_norm",
    "k_norm.weight": "k_norm",
    "k_base": "base",
    "b": "bias",
}


def _weight() -> Any:
    return attrs.field(repr=False, validator=is_a(Tensor, "a tensor"))


@named
@attrs.frozen(kw_only=True, eq=False)
class FastKVzip(Eviction):
    """Scores tokens by a gate that was trained on KVzip's scores.

    s = mean over the group of 1 / (1 + sum_j exp(q . base_j / r - (q . k / r + bias))) with
    r = sqrt(d), q and k being RMS-normalised projections of the attention input to d channels
    (Kim et al. 2026, arXiv 2601.17668; Janghyun1230/FastKVzip, prefill/attention/gate.py). Weights
    of L layers are stacked: `q` `[L, Hkv G d, hidden]`, `q_bias` `[L, Hkv G d]`, `k`
    `[L, Hkv d, hidden]`, `q_norm`, `k_norm` `[L, d]`, `base` `[L, Hkv, 1, J, d]`, `bias`
    `[L, Hkv, 1, G]`. The first `sinks` tokens always stay. The original shares its budget between
    all heads and layers (`AcrossLayers(Ratio(0.3), floor=0)`) and keeps a window of a fiftieth of
    the context, 4096 tokens from 32,000 on: give the pipeline a `window` of so many.

    Example:
        `CachePipeline(eviction=FastKVzip.from_pretrained("q4_dim16_sink16.pt", budget=Ratio(0.3)))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    q: Tensor = _weight()
    q_bias: Tensor = _weight()
    k: Tensor = _weight()
    q_norm: Tensor = _weight()
    k_norm: Tensor = _weight()
    base: Tensor = _weight()
    bias: Tensor = _weight()
    when: When = when_field()
    sinks: int = attrs.field(default=4, validator=not_negative)
    source: Source | None = source_field()
    needs = frozenset({"hidden"})
    numbered = True

    def __attrs_post_init__(self) -> None:
        if self.base.ndim != 5 or self.bias.ndim != 4 or self.q.ndim != 3:
            shapes = ", ".join(str(list(x.shape)) for x in (self.base, self.bias, self.q))
            raise ValueError(
                "base, bias, q: wanted [L, Hkv, 1, J, d], [L, Hkv, 1, G] and "
                f"[L, Hkv G d, hidden], got {shapes}"
            )
        layers, heads, _, amount, dim = self.base.shape
        group, hidden = self.bias.shape[3], self.q.shape[2]
        wanted = {
            "q": (layers, heads * group * dim, hidden), "q_bias": (layers, heads * group * dim),
            "k": (layers, heads * dim, hidden), "q_norm": (layers, dim), "k_norm": (layers, dim),
            "base": (layers, heads, 1, amount, dim), "bias": (layers, heads, 1, group),
        }  # fmt: skip
        check_floats(self, wanted)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        file: str | None = None,
        *,
        budget: Budget | int,
        when: When = "prompt_end",
        sinks: int = 4,
        revision: str | None = None,
    ) -> FastKVzip:
        """Reads a gate in the layout of `Jang-Hyun/Fast-KVzip` on the hub; runs no code of it.

        Args:
            path_or_repo: a `.pt` file, a directory or a hub repository's id.
            file: the file's name there, such as "qwen3-8b/q4_dim16_sink16.pt".
            budget: what stays.
            when: when tokens go.
            sinks: leading tokens that always stay.
            revision: branch, tag or commit of the hub repository.

        Raises:
            ValueError: the file is damaged or holds something else.
        """
        path, source = located(path_or_repo, file, revision)
        found = read_pt(path)
        layers = found.get("module") if isinstance(found, dict) else None
        if not isinstance(layers, list) or not layers:
            raise ValueError(f"{path}: wanted a dict with a list of layers at 'module'")
        for n, layer in enumerate(layers):
            if not isinstance(layer, dict) or set(layer) != set(_NAMES):
                got = sorted(layer) if isinstance(layer, dict) else type(layer).__name__
                raise ValueError(f"{path}: layer {n}: wanted {sorted(_NAMES)}, got {got}")
        try:
            stacked = {f: torch.stack([x[name] for x in layers]) for name, f in _NAMES.items()}
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{path}: layers of different shapes: {error}") from error
        kept = tokens_from_int(budget)
        return cls(budget=kept, when=when, sinks=sinks, source=source, **stacked)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.pt` file in the authors' layout."""
        layers = range(len(self.q))
        content = [{name: getattr(self, f)[n] for name, f in _NAMES.items()} for n in layers]
        write_pt(Path(path), {"module": content})

    def number(self, write: Write) -> Tensor:
        """The gate's scores `[Hkv, T]`."""
        if write.hidden is None:
            raise ValueError("write.hidden: FastKVzip reads the attention input, got None")
        n, dim = write.layer, self.base.shape[4]
        q, q_bias, k = (x[n].to(write.hidden) for x in (self.q, self.q_bias, self.k))
        shape = self.base.shape[1], -1, dim

        def gate(tile: Tensor) -> Tensor:
            queries = (tile @ q.T + q_bias).unflatten(1, shape)
            queries = _normed(queries, self.q_norm[n])  # [64, Hkv, G, d]
            keys = _normed((tile @ k.T).unflatten(1, shape), self.k_norm[n])
            base = self.base[n, :, 0].to(queries)[:, None]  # [Hkv, 1, J, d]
            logit = (queries * keys).sum(-1) / dim**0.5 + self.bias[n, :, 0].to(queries)
            other = (queries[..., None, :] * base).sum(-1) / dim**0.5
            scores: Tensor = 1 / (1 + (other - logit[..., None]).exp().sum(-1))
            return scores.mean(-1)

        # Of all heads, so that those of a tensor-parallel rank are rounded as elsewhere.
        return by_tile(write.hidden, gate).T[write.heads.start : write.heads.stop]

    def score(self, view: EvictionView) -> Tensor:
        assert view.numbers is not None
        # No score is more than 1.
        return torch.where(view.positions < self.sinks, 2.0, view.numbers)

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        wanted, found = [layers, kv_heads], list(self.base.shape[:2])
        if found != wanted:
            raise ValueError(f"base: wanted [L, Hkv, ...] = {wanted} of the model, got {found}")

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> FastKVzip:
        return attrs.evolve(self, **{x: getattr(self, x).to(device) for x in _NAMES.values()})


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMS-normalised in float32 at least and rounded to `x`'s dtype, times the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)
    rounded = (wide * scale).to(x.dtype).to(wide)
    return rounded * weight.to(wide)
