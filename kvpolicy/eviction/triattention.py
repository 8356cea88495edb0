"""TriAttention: keep the keys that a head's usual query will like, wherever it stands next."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import attrs
import torch
from torch import Tensor

from .._fields import flag, is_a, one_of, positive
from .._files import read_named, read_pt, write_safetensors
from .._names import named
from ..admission import Write
from ..admission._files import Source, located, source_field
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import HeadGroup, When
from ..ops import Ops
from ..rope import Rope
from ._base import Eviction, when_field, wide
from ._view import EvictionView, StoredTokens
from .expected_attention import FIRST

PARTS = ("q_mean_real", "q_mean_imag", "q_abs_mean")  # of a head, in the authors' files


def _statistics() -> Any:
    return attrs.field(repr=False, validator=is_a(Tensor, "a tensor"))


@named
@attrs.frozen(kw_only=True, eq=False)
class TriAttention(Eviction):
    """Scores tokens by trigonometric series in their distance, with statistics from a file.

    Pairs of channels that RoPE turns together are complex numbers. With the mean q and the mean
    size a of a query head's queries before RoPE, a key k (as it is stored) at the end t of the
    sequence scores `sum_f Re(q_f e^{i w_f (t + d)} conj(k_f)) + (a_f - |q_f|) |k_f|`, times RoPE's
    factor, the mean over the offsets d = 1, 2, 4 ... `farthest`. A head's scores are normalized
    over its stored tokens (`normalize`), and a group's query heads share the largest or the mean
    (`group`). With `keep_prompt` the prompt's tokens stay. `real`, `imaginary`, `size`
    `[L, Hq, D / 2]` are q and a.

    Mao et al., 2026 (WeianMao/triattention, methods/triattention.py with per-layer-per-head
    pruning, and methods/pruning_utils.py; statistics in `calibration/*.pt`). The authors compress
    every 128 generated tokens: `attach(..., interval=128)`.

    Example:
        `CachePipeline(eviction=TriAttention.from_pretrained("stats.pt", budget=2048))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    real: Tensor = _statistics()
    imaginary: Tensor = _statistics()
    size: Tensor = _statistics()
    when: When = when_field("decode")
    farthest: int = attrs.field(default=1 << 16, validator=positive)
    group: HeadGroup = attrs.field(default="max", validator=one_of(*get_args(HeadGroup)))
    normalize: bool = attrs.field(default=True, validator=flag)
    keep_prompt: bool = attrs.field(default=False, validator=flag)
    source: Source | None = source_field()

    def __attrs_post_init__(self) -> None:
        for name in ("real", "imaginary", "size"):
            x: Tensor = getattr(self, name)
            if x.ndim != 3 or x.shape != self.real.shape or not x.is_floating_point():
                raise ValueError(f"{name}: wanted floats [L, Hq, D / 2], got {list(x.shape)}")

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        file: str | None = None,
        *,
        budget: Budget | int,
        revision: str | None = None,
        **options: Any,
    ) -> TriAttention:
        """Reads statistics in the authors' `.pt` layout, or a `.safetensors` file by `save`.

        Args:
            path_or_repo: a file, a directory or a hub repository's id.
            file: the file's name in the directory or repository.
            budget: what stays.
            revision: branch, tag or commit of the hub repository.
            options: other fields.

        Raises:
            ValueError: the file is damaged, or lacks a head.
        """
        path, source = located(path_or_repo, file, revision)
        if path.suffix == ".pt":
            parts = _stacked(read_pt(path), str(path))
        else:
            parts = read_named(path, *PARTS)
        real, imaginary, size = (parts[name] for name in PARTS)
        return cls(
            budget=tokens_from_int(budget), real=real, imaginary=imaginary, size=size,
            source=source, **options,
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.safetensors` file of all heads."""
        parts = (self.real, self.imaginary, self.size)
        write_safetensors(Path(path), dict(zip(PARTS, parts, strict=True)), {})

    @property
    def prefers_window(self) -> int:
        return 1

    @property
    def rope(self) -> bool:
        return True

    def mark(self, write: Write) -> Tensor | None:
        """Tells the prompt's tokens from generated ones, which always have the mark."""
        if not self.keep_prompt:
            return None
        return torch.zeros(write.key.shape[:2], dtype=torch.bool, device=write.key.device)

    def scores(self, ops: Ops, stored: StoredTokens) -> Tensor:
        view = stored.view()
        linear, more, rope = self._series(view, stored.pages.k)
        found = ops.key_dots(
            stored.pages, stored.heads, linear, more.expand(len(linear), -1, -1),
            rope.layout(linear.shape[2]),
        )  # fmt: skip
        return self._scores(view, found)

    def score(self, view: EvictionView) -> Tensor:
        linear, more, rope = self._series(view, view.keys)
        batch, kv_heads, width = view.valid.shape
        found = linear.new_zeros(batch, kv_heads, linear.shape[1] // kv_heads, width)
        m, s = linear.unflatten(1, (kv_heads, -1)), more.unflatten(0, (kv_heads, -1))
        for row, used in enumerate(view.used):
            keys = view.keys[row, :, :used].to(linear)
            first, second, _ = rope.pairs(keys)
            found[row, ..., :used] = m[row] @ keys.mT + s @ torch.hypot(first, second).mT
        return self._scores(view, found.flatten(1, 2))

    def _series(self, view: EvictionView, keys: Tensor) -> tuple[Tensor, Tensor, Rope]:
        """What keys `[B, Hq, D]` and the sizes of their pairs `[Hq, D / 2]` are multiplied with."""
        rope, dim = view.rope, keys.shape[-1]
        if rope is None:
            raise ValueError(f"rope: TriAttention wants RoPE, layer {view.layer} has none")
        rows = slice(view.heads.start * view.group, view.heads.stop * view.group)
        parts = (x[view.layer, rows].double() for x in (self.real, self.imaginary, self.size))
        real, imaginary, size = parts
        turn = view.once(("ahead", rope, self.farthest), lambda: self._turn(rope, view.lengths))
        ahead = torch.complex(real, imaginary) * turn  # [B, Hq, F]
        rest = ahead.real.new_zeros(*ahead.shape[:2], dim - 2 * ahead.shape[2])
        linear = rope.joined(ahead.real, ahead.imag, rest) * rope.factor
        more = (size - torch.hypot(real, imaginary)) * rope.factor
        dtype = wide(keys)
        return linear.to(dtype), more.to(dtype), rope

    def _turn(self, rope: Rope, lengths: Tensor) -> Tensor:
        """The mean rotation `[B, 1, F]` of positions ahead of sequences of `lengths` `[B]`."""
        offsets = 1 << torch.arange(self.farthest.bit_length(), device=lengths.device)
        angle = rope.angles(lengths[:, None] + offsets)  # [B, n, F]
        return torch.polar(torch.ones_like(angle), angle).mean(1)[:, None]

    def _scores(self, view: EvictionView, series: Tensor) -> Tensor:
        """From the series `[B, Hq, N]` of the stored tokens, each sequence as long as it is."""
        kv_heads = view.valid.shape[1]
        found = series.new_zeros(view.valid.shape)
        for row, used in enumerate(view.used):
            scores = series[row, :, :used].unflatten(0, (kv_heads, -1))  # [Hkv, G, used]
            if self.normalize:
                scores = _normalized(scores, view.valid[row, :, None, :used])
            found[row, :, :used] = scores.amax(1) if self.group == "max" else scores.mean(1)
        return found.masked_fill(~view.marked, FIRST) if self.keep_prompt else found

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        found = list(self.real.shape)
        fits = found[0] == layers and found[1] % kv_heads == 0 and 2 * found[2] <= head_dim
        if not fits:
            wanted = f"[{layers}, a multiple of {kv_heads}, at most {head_dim // 2}]"
            raise ValueError(f"real: wanted [L, Hq, D / 2] = {wanted} of the model, got {found}")

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> TriAttention:
        parts = {name: getattr(self, name).to(device) for name in ("real", "imaginary", "size")}
        return attrs.evolve(self, **parts)


def _normalized(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores `[Hkv, G, N]` less their mean over what is valid, over their deviation."""
    count = valid.sum(-1, keepdim=True).clamp(min=1)
    mean = scores.masked_fill(~valid, 0).sum(-1, keepdim=True) / count
    away = (scores - mean).masked_fill(~valid, 0)
    return away / ((away * away).sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-6)


def _stacked(state: object, source: str) -> dict[str, Tensor]:
    """The statistics of all heads in the authors' layout, a dict a head, as `[L, Hq, D / 2]`."""
    heads = state.get("stats") if isinstance(state, Mapping) else None
    if not isinstance(heads, Mapping) or not heads:
        raise ValueError(f"{source}: wanted a dict with the key stats, got {type(state).__name__}")
    last = max(heads)
    try:
        layers, query_heads = (1 + int(part.strip("layerhd")) for part in last.split("_"))
        rows = [
            [heads[f"layer{n:02d}_head{h:02d}"] for h in range(query_heads)] for n in range(layers)
        ]
        each = {
            name: torch.stack([torch.stack([head[name] for head in row]) for row in rows])
            for name in PARTS
        }
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        wanted = f"{', '.join(PARTS)} of each head as layerLL_headHH"
        raise ValueError(f"{source}: wanted {wanted}, got an odd one: {error}") from None
    return each
