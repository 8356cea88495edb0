"""KVzap: a small model on the attention input predicts how much a token will matter."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import check_floats, is_a, number, optional, positive
from .._files import read_safetensors, write_safetensors
from .._knob import Knob
from .._names import named
from ._base import Admission, Write
from ._files import Source, located, source_field
from ._threshold import rounded

TILE = 64  # tokens of a product
VECTOR = 32  # what channels are padded to
_KEY = re.compile(r"layers\.(\d+)\.(?:(0|2)\.)?(weight|bias)")
_HIGHEST, _LOWEST = 8.0, -16.0  # a knob's thresholds: logarithms of parts of a head's output


def _weights() -> Any:
    return attrs.field(repr=False, validator=is_a(Tensor, "a tensor"))


def _hidden_layer() -> Any:
    return attrs.field(
        default=None, repr=False, validator=optional(is_a(Tensor, "a tensor or None"))
    )


@named
@attrs.frozen(kw_only=True, eq=False)
class KVzap(Admission):
    """Admits a token of a KV head if its predicted score is at least `threshold`.

    Jégou and Jeblick, 2026 (NVIDIA/kvpress, kvzap_press.py with dms_press.py). The score predicts
    the logarithm of KVzip+'s: w2 . gelu(w1 h + b1) + b2, or w2 . h + b2 without a hidden layer, of
    the attention input h. Weights of L layers are stacked: `w1` `[L, m, hidden]`, `b1` `[L, m]`,
    `w2` `[L, Hkv, m]`, or `[L, Hkv, hidden]`, and `b2` `[L, Hkv]`. The prompt is sparse here; the
    authors' is dense: `AtPromptEnd(KVzap...)`. `window` is theirs, 128 tokens.

    Example:
        `CachePipeline(admission=KVzap.from_pretrained("kvzap.safetensors", threshold=-4))`
    """

    w2: Tensor = _weights()
    b2: Tensor = _weights()
    w1: Tensor | None = _hidden_layer()
    b1: Tensor | None = _hidden_layer()
    threshold: float = attrs.field(default=-4.0, validator=number("a number", lambda x: True))
    window: int | None = attrs.field(default=128, validator=optional(positive))
    source: Source | None = source_field()
    needs = frozenset({"hidden"})

    def __attrs_post_init__(self) -> None:
        if self.w2.ndim != 3 or (self.w1 is not None and self.w1.ndim != 3):
            raise ValueError(
                f"w1, w2: wanted [L, m, hidden] and [L, Hkv, m], got "
                f"{None if self.w1 is None else list(self.w1.shape)} and {list(self.w2.shape)}"
            )
        if (self.w1 is None) != (self.b1 is None):
            given = "w1" if self.b1 is None else "b1"
            raise ValueError(f"w1, b1: wanted both or none of them, got {given} only")
        layers, heads, inner = self.w2.shape
        shapes: dict[str, tuple[int, ...]] = {"b2": (layers, heads)}
        if self.w1 is not None:
            shapes |= {"w1": (layers, inner, self.w1.shape[2]), "b1": (layers, inner)}
        check_floats(self, shapes)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        file: str | None = None,
        *,
        threshold: float = -4.0,
        window: int | None = 128,
        revision: str | None = None,
    ) -> KVzap:
        """Reads a model in the layout of NVIDIA's `KVzap-linear-...` and `KVzap-mlp-...`.

        Args:
            path_or_repo: a `.safetensors` file, a directory or a hub repository's id.
            file: the file's name in the directory or repository ("model.safetensors" there).
            threshold: what a score must reach.
            window: local window in tokens; None: any.
            revision: branch, tag or commit of the hub repository.

        Raises:
            ValueError: the file is damaged or holds something else; the message names the key.
        """
        path, source = located(path_or_repo, file, revision)
        found, _ = read_safetensors(path)
        stacked = _stacked(found, str(path))
        return cls(**stacked, threshold=threshold, window=window, source=source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.safetensors` file in the published layout."""
        parts = {"weight": self.w2, "bias": self.b2}
        if self.w1 is not None and self.b1 is not None:
            parts = {"0.weight": self.w1, "0.bias": self.b1, "2.weight": self.w2, "2.bias": self.b2}
        layers = range(len(self.w2))
        tensors = {f"layers.{n}.{name}": x[n] for name, x in parts.items() for n in layers}
        write_safetensors(Path(path), tensors, {})

    def scores(self, write: Write) -> Tensor:
        """Predicted scores `[Hkv, T]` in the attention input's dtype.

        Products have one shape for 1 and for 4096 tokens: others would be rounded by shape.
        """
        if write.hidden is None:
            raise ValueError("write.hidden: KVzap reads the attention input, got None")
        n, rows = write.layer, slice(write.heads.start, write.heads.stop)
        w2, b2, hidden = self.w2[n, rows], self.b2[n, rows], write.hidden
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tiles = F.pad(hidden, (0, 0, 0, -len(hidden) % TILE)).unflatten(0, (-1, TILE))
        found = hidden.new_empty(len(tiles), len(w2), TILE, dtype=wide)
        for tile, out in zip(tiles.unbind(0), found.unbind(0), strict=True):
            out.copy_((self._hidden(n, tile).to(wide) * w2[:, None].to(wide)).sum(-1))
        return (found.transpose(0, 1).flatten(1)[:, : len(hidden)] + b2.to(wide)[:, None]).to(
            hidden
        )

    def _hidden(self, layer: int, tile: Tensor) -> Tensor:
        """Activations `[TILE, m]` of a tile of attention inputs."""
        if self.w1 is None or self.b1 is None:
            return tile
        w1, channels = self.w1[layer].to(tile), -tile.shape[1] % VECTOR
        units = -w1.shape[0] % VECTOR
        if channels or units:
            tile, w1 = F.pad(tile, (0, channels)), F.pad(w1, (0, channels, 0, units))
        inner = (tile @ w1.T)[:, : w1.shape[0] - units] + self.b1[layer].to(tile)
        x = inner.to(torch.promote_types(inner.dtype, torch.float32))
        return (0.5 * x * (1 + torch.erf(x * 0.5**0.5))).to(inner.dtype)

    def admit(self, write: Write) -> Tensor:
        return self.scores(write) >= rounded(self.threshold, write.key.dtype)

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        wanted, found = [layers, kv_heads], list(self.b2.shape)
        if found != wanted:
            raise ValueError(f"KVzap: made for [L, Hkv] = {found}, the model has {wanted}")

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> KVzap:
        weights = {name: getattr(self, name) for name in ("w1", "b1", "w2", "b2")}
        moved = {name: x.to(device, dtype) for name, x in weights.items() if x is not None}
        return attrs.evolve(self, **moved)

    def knob(self, pattern: str | os.PathLike[str] | None = None) -> Knob[Admission]:
        return Knob(
            name="threshold",
            at=lambda x: _HIGHEST + (_LOWEST - _HIGHEST) * x,
            set=lambda value: attrs.evolve(self, threshold=value),
        )


def _stacked(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The fields of published keys, stacked over layers."""
    matches = {name: _KEY.fullmatch(name) for name in state}
    other = next((name for name, match in matches.items() if match is None), None)
    if other is not None or not state:
        wanted = "layers.N.weight and bias, or layers.N.0 and layers.N.2"
        raise ValueError(f"{source}: wanted keys {wanted}, got {other or 'none'}")
    deep = any(match and match[2] for match in matches.values())
    layers = len({match[1] for match in matches.values() if match})
    names = {"w2": "weight", "b2": "bias"}
    if deep:
        names = {"w1": "0.weight", "b1": "0.bias", "w2": "2.weight", "b2": "2.bias"}
    wanted_keys = {f"layers.{n}.{name}" for n in range(layers) for name in names.values()}
    if different := sorted(wanted_keys ^ set(state)):
        told = "missing" if different[0] in wanted_keys else "unexpected"
        raise ValueError(f"{source}: {told} key {different[0]}")
    found = {}
    for field, name in names.items():
        rows = [state[f"layers.{n}.{name}"] for n in range(layers)]
        for n, row in enumerate(rows):
            if row.shape != rows[0].shape or not row.isfinite().all():
                raise ValueError(
                    f"{source}: layers.{n}.{name}: wanted finite numbers {list(rows[0].shape)} as "
                    f"in layer 0, got {list(row.shape)}"
                )
        found[field] = torch.stack(rows)
    return found
