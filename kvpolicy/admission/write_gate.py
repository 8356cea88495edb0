"""The learned write gate of WG-KV."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from .._fields import flag, fraction, is_a, one_of, optional, positive
from .._knob import Knob
from .._names import named
from ..backend import resolve
from ..ops import load
from . import _gate_file
from ._base import Admission, Write
from ._files import Source, located, source_field
from ._threshold import rounded

_STEEPEST = 12.0  # a knob's thresholds run over the sigmoid of -12 to 12
ACTIVATIONS = ("gelu", "silu")
WEIGHTS = ("norm_pre", "norm_post", "w1", "b1", "w2", "b2")


def _weight() -> Any:
    return attrs.field(repr=False, validator=is_a(Tensor, "a tensor"))


@named
@attrs.frozen(kw_only=True, eq=False)
class WriteGate(Admission):
    """Admits a token of a KV head if its gate g is above `threshold` (EMCLab-Sinica/WG-KV).

    g = sigmoid(w2 . gelu(w1 [n(key_pre); n(key)] + b1) + b2), an MLP per layer and KV head on the
    RMS-normalised key before and after RoPE; `activation` "silu" stands in for "gelu" where a gate
    was trained with it. Weights of L layers are stacked: `norm_pre`,
    `norm_post` `[L, D]`, `w1` `[L, Hkv, m, 2D]`, `b1`, `w2` `[L, Hkv, m]`, `b2` `[L, Hkv]`. Gate
    and threshold are compared in the keys' dtype; `inclusive` admits equality too. `window` is the
    local window that the gate was trained with (256 for the published ones).

    Example:
        `CachePipeline(admission=WriteGate.from_pretrained("gates", "gate.safetensors"))`
    """

    norm_pre: Tensor = _weight()
    norm_post: Tensor = _weight()
    w1: Tensor = _weight()
    b1: Tensor = _weight()
    w2: Tensor = _weight()
    b2: Tensor = _weight()
    threshold: float = attrs.field(default=0.1, validator=fraction())
    inclusive: bool = attrs.field(default=False, validator=flag)
    window: int | None = attrs.field(default=256, validator=optional(positive))
    activation: str = attrs.field(
        default="gelu", validator=one_of(*ACTIVATIONS), metadata={"before": "gelu"}
    )
    backend: str = attrs.field(
        default="reference", repr=False, validator=one_of("reference", "triton")
    )
    source: Source | None = source_field()
    needs = frozenset({"key_pre"})

    def __attrs_post_init__(self) -> None:
        if self.w1.ndim != 4 or self.norm_pre.ndim != 2 or 0 in self.w1.shape:
            raise ValueError(
                f"w1, norm_pre: wanted shapes [L, Hkv, m, 2D] and [L, D], got "
                f"{tuple(self.w1.shape)} and {tuple(self.norm_pre.shape)}"
            )
        layers, heads, width, dim = *self.w1.shape[:3], self.norm_pre.shape[1]
        shapes = {
            "norm_pre": (layers, dim),
            "norm_post": (layers, dim),
            "w1": (layers, heads, width, 2 * dim),
            "b1": (layers, heads, width),
            "w2": (layers, heads, width),
            "b2": (layers, heads),
        }
        for name, shape in shapes.items():
            found: Tensor = getattr(self, name)
            if found.shape != shape:
                raise ValueError(f"{name}: wanted shape {shape}, got {tuple(found.shape)}")
            if not found.is_floating_point() or found.dtype != self.w1.dtype:
                raise TypeError(f"{name}: wanted floats of w1's dtype, got {found.dtype}")
            # On other devices it would wait, and files are checked when they are read.
            if found.device.type == "cpu" and not found.isfinite().all():
                raise ValueError(f"{name}: wanted finite weights, got NaN or infinite ones")

    @property
    def layers(self) -> int:
        """Layers L that have a gate."""
        return self.w1.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads per layer."""
        return self.w1.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels D of a key."""
        return self.norm_pre.shape[1]

    @property
    def width(self) -> int:
        """Hidden units m per KV head."""
        return self.w1.shape[2]

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        file: str | None = None,
        *,
        threshold: float | None = None,
        window: int | None = None,
        activation: str | None = None,
        revision: str | None = None,
    ) -> WriteGate:
        """Reads gates in the layout of WG-KV; all sizes come from the file.

        Args:
            path_or_repo: a `.pt` or `.safetensors` file, a directory, a hub repository's id, or a
                name of `kvpolicy.pretrained`.
            file: the file's name in the directory or repository.
            threshold: admits above it; default the file's metadata, else 0.1.
            window: local window in tokens; default the file's metadata, else 256.
            activation: "gelu" or "silu", which the tensors do not tell; default the file's
                metadata, else "gelu".
            revision: branch, tag or commit of the hub repository.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a key is missing, unexpected, misshapen or not finite; the message names it.
        """
        path, source = located(path_or_repo, file, revision)
        stacks, metadata = _gate_file.read(path)
        given: dict[str, Any] = {"threshold": threshold, "window": window, "activation": activation}
        noted: dict[str, Any] = {
            name: _number(path, metadata, name, default)
            for name, default in (("threshold", 0.1), ("window", 256))
            if given[name] is None
        }
        if activation is None:
            noted["activation"] = metadata.get("activation", "gelu")
        weights: dict[str, Any] = dict(stacks)
        try:
            gate = cls(**weights, **noted, source=source)
        except ValueError as error:
            raise ValueError(f"{path}: metadata {error}") from error
        return attrs.evolve(gate, **{k: v for k, v in given.items() if v is not None})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the published layout: `.pt`, or `.safetensors` with all but the weights too."""
        metadata = {"threshold": repr(float(self.threshold)), "activation": self.activation}
        if self.window is not None:
            metadata["window"] = str(self.window)
        _gate_file.write(Path(path), {name: getattr(self, name) for name in WEIGHTS}, metadata)

    def scores(self, write: Write) -> Tensor:
        """Gate values `[Hkv, T]` in [0, 1], in the keys' dtype."""
        return self._gate(write)

    def admit(self, write: Write) -> Tensor:
        limit = rounded(self.threshold, write.key.dtype)
        return self._gate(write, limit=limit, inclusive=self.inclusive)

    def _gate(self, write: Write, **decide: Any) -> Tensor:
        if write.key_pre is None:
            raise ValueError("write.key_pre: WriteGate reads keys before RoPE, got None")
        rows = slice(write.heads.start, write.heads.stop)
        n = write.layer
        return load(self.backend).write_gate(
            write.key_pre,
            write.key,
            self.norm_pre[n],
            self.norm_post[n],
            self.w1[n, rows],
            self.b1[n, rows],
            self.w2[n, rows],
            self.b2[n, rows],
            silu=self.activation == "silu",
            **decide,
        )

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        model = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, wanted in model.items():
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"WriteGate: made for {name}={getattr(self, name)}, "
                    f"the model has {name}={wanted}"
                )

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> WriteGate:
        weights = {name: getattr(self, name).to(device, dtype).contiguous() for name in WEIGHTS}
        return attrs.evolve(self, **weights, backend=resolve(backend, torch.device(device)))

    def knob(self, pattern: str | os.PathLike[str] | None = None) -> Knob[Admission]:
        return Knob(
            name="threshold",
            at=_even_logits,
            set=lambda value: attrs.evolve(self, threshold=value),
        )


def _even_logits(x: float) -> float:
    """1 at 0, 0 at 1, and even steps of the gate's logit between."""
    if x in (0, 1):
        return float(1 - x)
    return 1 / (1 + math.exp(_STEEPEST * (2 * x - 1)))


def _number(path: Path, metadata: dict[str, str], name: str, default: Any) -> Any:
    """A number of the file's metadata, of the default's type."""
    try:
        return type(default)(metadata.get(name, default))
    except ValueError as error:
        raise ValueError(f"{path}: metadata {name}: {error}") from error
