"""The trainable write gate, in the published checkpoint layout (WG-KV)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.hf.fingerprints import keys_fingerprint
from ..adapters.hf.models import attention_layers, managed_sizes
from ..admission import _gate_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = Literal["both", "pre", "post"]
FLOOR = 1e-3  # bounds ln g; below every useful threshold
EPS = 1e-6  # of the gate's own norms, not of the model's


class KeyNorm(nn.Module):
    """RMS norm over head_dim, one weight vector for all KV heads of a layer."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))


class GatePredictor(nn.Module):
    """One layer's gate: an MLP per KV head on the keys before and after RoPE.

    Args:
        kv_heads: KV heads H.
        head_dim: channels D of a head.
        width: hidden units m per head.
    """

    def __init__(self, kv_heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.kv_heads, self.head_dim, self.width = kv_heads, head_dim, width
        self.pre_key_norm = KeyNorm(head_dim)
        self.post_key_norm = KeyNorm(head_dim)
        # Only weights and initialisation of the convolutions are used; see forward.
        self.conv1 = nn.Conv1d(kv_heads * 2 * head_dim, kv_heads * width, 1, groups=kv_heads)
        self.conv2 = nn.Conv1d(kv_heads * width, kv_heads, 1, groups=kv_heads)

    def fields(self) -> dict[str, Tensor]:
        """Views of the parameters, detached, under the names and shapes of a WriteGate's layer."""
        heads, width = self.kv_heads, self.width
        bias1, bias2 = cast(Tensor, self.conv1.bias), cast(Tensor, self.conv2.bias)
        views = {
            "norm_pre": self.pre_key_norm.weight,
            "norm_post": self.post_key_norm.weight,
            "w1": self.conv1.weight.view(heads, width, 2 * self.head_dim),
            "b1": bias1.view(heads, width),
            "w2": self.conv2.weight.view(heads, width),
            "b2": bias2,
        }
        return {name: view.detach() for name, view in views.items()}

    @torch.no_grad()
    def only(self, inputs: Inputs) -> None:
        """Zeroes the weights of the key that is left out, and keeps them 0 in training."""
        if inputs == "both":
            return
        weight = self.conv1.weight
        read = torch.zeros_like(weight)
        read[:, : self.head_dim] = inputs == "pre"
        read[:, self.head_dim :] = inputs == "post"
        weight.mul_(read)
        weight.register_hook(lambda grad: grad * read)

    def forward(self, key_pre: Tensor, key_post: Tensor) -> Tensor:
        """Gate values `[B, H, N]` in [FLOOR, 1], fp32 at least, of two keys `[B, H, N, D]`."""
        with torch.autocast(key_pre.device.type, enabled=False):
            dtype = torch.promote_types(key_pre.dtype, torch.float32)
            keys = torch.cat(
                [self.pre_key_norm(key_pre.to(dtype)), self.post_key_norm(key_post.to(dtype))], -1
            )
            # A grouped 1x1 convolution is a batched matmul over heads, which is faster.
            bias1, bias2 = cast(Tensor, self.conv1.bias), cast(Tensor, self.conv2.bias)
            first = self.conv1.weight.view(self.kv_heads, self.width, 2 * self.head_dim)
            hidden = keys @ first.mT + bias1.view(self.kv_heads, 1, self.width)
            logit = (F.gelu(hidden) * self.conv2.weight.mT).sum(-1) + bias2[:, None]
            return logit.sigmoid().clamp(min=FLOOR)


class WriteGates(nn.Module):
    """The gates of every layer of a model.

    Args:
        layers: decoder layers.
        kv_heads: KV heads of a layer.
        head_dim: channels of a head.
        expand: hidden units per channel of a head; m = int(head_dim * expand).
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, expand: float = 4.0) -> None:
        super().__init__()
        width = int(head_dim * expand + 1e-6)
        if width < 1:
            raise ValueError(f"expand: wanted at least one hidden unit a head, got {expand}")
        self.layers = nn.ModuleList(GatePredictor(kv_heads, head_dim, width) for _ in range(layers))

    @classmethod
    def for_model(cls, model: PreTrainedModel, expand: float = 4.0) -> WriteGates:
        """Fresh fp32 gates on the model's device.

        Raises:
            UnsupportedError: the adapter does not serve the model.
        """
        layers = attention_layers(model)
        sizes = managed_sizes(layers)
        gates = cls(len(layers), sizes.kv_heads, sizes.head_dim, expand)
        return gates.to(sizes.device)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> WriteGates:
        """Gates of a published file, fp32 on the model's device, to continue from.

        Raises:
            ValueError: the file is malformed or belongs to another model.
        """
        fields, metadata = _gate_file.read(Path(path))
        mine = keys_fingerprint(model)
        if metadata.get("model", mine) != mine:
            raise ValueError(
                f"{path}: wanted gates of model {mine}, got those of {metadata['model']}"
            )
        gates = cls.for_model(model, fields["w1"].shape[2] / fields["norm_pre"].shape[1])
        for name, wanted in gates.fields().items():
            if fields[name].shape != wanted.shape:
                raise ValueError(
                    f"{path}: {name}: wanted {list(wanted.shape)}, which fits the model, got "
                    f"{list(fields[name].shape)}"
                )
        gates.load_fields(fields)
        return gates

    def fields(self) -> dict[str, Tensor]:
        """Parameters stacked over layers `[L, ...]`, under the names of WriteGate's fields, where
        their shapes are; on the CPU."""
        layers = cast(list[GatePredictor], self.layers)
        each = [layer.fields() for layer in layers]
        return {name: torch.stack([part[name] for part in each]).cpu() for name in each[0]}

    @torch.no_grad()
    def load_fields(self, fields: Mapping[str, Tensor]) -> None:
        """Inverse of `fields`, whose shapes must be those of these gates."""
        for n, layer in enumerate(cast(list[GatePredictor], self.layers)):
            for name, own in layer.fields().items():
                own.copy_(fields[name][n])

    def save(
        self,
        path: str | Path,
        *,
        metadata: dict[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write a plain dict (`.pt`) or safetensors with metadata (`.safetensors`)."""
        fields = {name: value.to(dtype) for name, value in self.fields().items()}
        _gate_file.write(Path(path), fields, metadata or {})


@attrs.frozen(kw_only=True)
class TrainedGate:
    """Gates and what they were trained for.

    Attributes:
        gates: the gates, fp32.
        window: tokens of the local window W, the token itself included.
        threshold: a token is admitted if its gate > threshold.
        lam: weight of the regulariser at the end.
        keep: hard fraction of tokens in the cache at the end of training, window included.
        fingerprint: of the model that the gates belong to.
    """

    gates: WriteGates = attrs.field(repr=False)
    window: int
    threshold: float
    lam: float
    keep: float
    fingerprint: str

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write `.safetensors` (with metadata) or `.pt` (the published plain dict)."""
        metadata = {
            "model": self.fingerprint,
            "window": str(self.window),
            "threshold": repr(self.threshold),
            "lambda": f"{self.lam:.4g}",
            "keep": f"{self.keep:.4f}",
        }
        self.gates.save(path, metadata=metadata, dtype=dtype)
