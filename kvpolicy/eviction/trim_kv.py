"""TRIM-KV: a learned gate says how fast a token is forgotten."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import check_floats, is_a
from .._files import read_safetensors, write_safetensors
from .._names import named
from ..admission import Write
from ..admission._files import Source, located, source_field
from ..admission._products import by_tile
from ..budget import Budget, is_budget, tokens_from_int
from ..choices import When
from ._base import Eviction, when_field
from ._view import EvictionView

_KEY = re.compile(r"model\.layers\.(\d+)\.self_attn\.retention_gate\.(.+)")
# Name in the file, name of the field.
_NAMES = {"linear1.weight": "w1", "linear1.bias": "b1", "linear2.weight": "w2", "bias": "b2"}


def _weight() -> Any:
    return attrs.field(repr=False, validator=is_a(Tensor, "a tensor"))


@named
@attrs.frozen(kw_only=True, eq=False)
class TrimKV(Eviction):
    """Keeps the tokens whose retention beta ** age is largest.

    beta = sigmoid(w2 . silu(w1 h + b1) + b2) of the attention input h, computed when a token is
    written; the score of one at position i when t tokens were seen is (t + 1 - i) log beta (Bui et
    al. 2025, arXiv 2512.03324; ngocbh/trimkv, cache_utils.py and the gate "rg" of its models).
    Weights of L layers are stacked: `w1` `[L, m, hidden]`, `b1` `[L, m]`, `w2` `[L, Hkv, m]`, `b2`
    `[L, Hkv]`. The model itself is not changed by training. The original drops a token a step.

    Example:
        `CachePipeline(eviction=TrimKV.from_pretrained("gates.safetensors", budget=512))`
    """

    budget: Budget = attrs.field(converter=tokens_from_int, validator=is_budget)
    w1: Tensor = _weight()
    b1: Tensor = _weight()
    w2: Tensor = _weight()
    b2: Tensor = _weight()
    when: When = when_field(default="decode")
    source: Source | None = source_field()
    needs = frozenset({"hidden"})
    numbered = True

    def __attrs_post_init__(self) -> None:
        if self.w1.ndim != 3 or self.w2.ndim != 3:
            got = f"{list(self.w1.shape)} and {list(self.w2.shape)}"
            raise ValueError(f"w1, w2: wanted [L, m, hidden] and [L, Hkv, m], got {got}")
        layers, inner, hidden = self.w1.shape
        heads = self.w2.shape[1]
        shapes = {
            "w1": (layers, inner, hidden), "b1": (layers, inner), "w2": (layers, heads, inner),
            "b2": (layers, heads),
        }  # fmt: skip
        check_floats(self, shapes)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        file: str | None = None,
        *,
        budget: Budget | int,
        when: When = "decode",
        revision: str | None = None,
    ) -> TrimKV:
        """Reads the gates from a `.safetensors` file that may hold the model's weights as well.

        Args:
            path_or_repo: a file, a directory or a hub repository's id.
            file: the file's name in the directory or repository ("model.safetensors" there).
            budget: what stays.
            when: when tokens go.
            revision: branch, tag or commit of the hub repository.

        Raises:
            ValueError: the file is damaged, or holds no gates of this kind for every layer.
        """
        path, source = located(path_or_repo, file, revision)
        found: dict[str, dict[int, Tensor]] = {name: {} for name in _NAMES}
        for key, tensor in read_safetensors(path)[0].items():
            if match := _KEY.fullmatch(key):
                if match[2] not in found:
                    raise ValueError(
                        f"{path}: {key}: wanted gates of {', '.join(_NAMES)} that read the "
                        "attention input; those that read keys and values are not served"
                    )
                found[match[2]][int(match[1])] = tensor
        layers = max(map(len, found.values()))
        for name, tensors in found.items():
            if not layers or sorted(tensors) != list(range(layers)):
                raise ValueError(
                    f"{path}: wanted retention_gate.{name} of {layers or 'all'} layers, got those "
                    f"of {sorted(tensors)}"
                )
        stacked = {
            field: torch.stack([found[name][n] for n in range(layers)])
            for name, field in _NAMES.items()
        }
        return cls(budget=tokens_from_int(budget), when=when, source=source, **stacked)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `.safetensors` file in the authors' layout."""
        tensors = {
            f"model.layers.{n}.self_attn.retention_gate.{name}": getattr(self, field)[n]
            for name, field in _NAMES.items()
            for n in range(len(self.w1))
        }
        write_safetensors(Path(path), tensors, {})

    def number(self, write: Write) -> Tensor:
        """log beta `[Hkv, T]`."""
        if write.hidden is None:
            raise ValueError("write.hidden: TrimKV reads the attention input, got None")
        n = write.layer
        w1, b1, w2, b2 = (x[n].to(write.hidden) for x in (self.w1, self.b1, self.w2, self.b2))

        def gate(tile: Tensor) -> Tensor:
            found = F.silu(tile @ w1.T + b1) @ w2.T + b2
            return F.logsigmoid(found.to(torch.promote_types(found.dtype, torch.float32)))

        # Of all heads, so that those of a tensor-parallel rank are rounded as elsewhere.
        return by_tile(write.hidden, gate).T[write.heads.start : write.heads.stop]

    def score(self, view: EvictionView) -> Tensor:
        assert view.numbers is not None
        age = view.lengths[:, None, None] + 1 - view.positions
        return age * view.numbers

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        wanted, found = [layers, kv_heads], list(self.b2.shape)
        if found != wanted:
            raise ValueError(f"b2: wanted [L, Hkv] = {wanted} of the model, got {found}")

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> TrimKV:
        return attrs.evolve(self, **{x: getattr(self, x).to(device) for x in _NAMES.values()})
