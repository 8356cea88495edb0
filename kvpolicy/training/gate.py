"""The trainable write gate, in the published checkpoint layout (WG-KV)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import attrs
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from ..adapters.hf.models import decoder_of, head_dim_of, keys_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    def forward(self, key_pre: Tensor, key_post: Tensor) -> Tensor:
        """Gate values `[B, H, N]` in [FLOOR, 1], fp32, of two keys `[B, H, N, D]`."""
        with torch.autocast(key_pre.device.type, enabled=False):
            keys = torch.cat(
                [self.pre_key_norm(key_pre.float()), self.post_key_norm(key_post.float())], -1
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
            raise ValueError(f"expand must give at least one hidden unit, got {expand}")
        self.layers = nn.ModuleList(GatePredictor(kv_heads, head_dim, width) for _ in range(layers))

    @classmethod
    def for_model(cls, model: PreTrainedModel, expand: float = 4.0) -> WriteGates:
        """Fresh fp32 gates on the model's device."""
        config, head_dim = model.config.get_text_config(), head_dim_of(decoder_of(model).config)
        gates = cls(config.num_hidden_layers, config.num_key_value_heads, head_dim, expand)
        return gates.to(model.device)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> WriteGates:
        """Gates of a published file, fp32 on the model's device, to continue from.

        Raises:
            ValueError: the file is malformed or belongs to another model.
        """
        path, metadata = Path(path), dict[str, str]()
        if path.suffix == ".pt":
            state = torch.load(path, map_location="cpu", weights_only=True)
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        else:
            raise ValueError(f"path must end in .pt or .safetensors, got {str(path)!r}")
        mine = keys_fingerprint(model)
        if metadata.get("model", mine) != mine:
            raise ValueError(f"{path} belongs to model {metadata['model']}, this one is {mine}")
        bias = state.get("model.layers.0.self_attn.g_predictors.conv1.bias")
        if bias is None:
            raise ValueError(f"{path} holds no gates of the published names")
        heads = model.config.get_text_config().num_key_value_heads
        gates = cls.for_model(model, bias.numel() / heads / head_dim_of(decoder_of(model).config))
        try:
            gates.load_published_state(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the model: {error}") from error
        return gates

    def published_state(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Parameters under the names of the published checkpoints, on the CPU."""
        return {
            f"model.layers.{n}.self_attn.g_predictors.{name}": value.detach().to("cpu", dtype)
            for n, layer in enumerate(self.layers)
            for name, value in layer.state_dict().items()
        }

    def load_published_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of published_state. Missing, unexpected or misshapen keys raise RuntimeError."""
        self.load_state_dict(
            {
                name.removeprefix("model.").replace(".self_attn.g_predictors.", "."): value
                for name, value in state.items()
            }
        )

    def save(
        self,
        path: str | Path,
        *,
        metadata: dict[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write a plain dict (`.pt`) or safetensors with metadata (`.safetensors`)."""
        path = Path(path)
        state = {name: value.contiguous() for name, value in self.published_state(dtype).items()}
        if path.suffix == ".pt":
            torch.save(state, path)
        elif path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state, path, metadata=metadata)
        else:
            raise ValueError(f"path must end in .pt or .safetensors, got {str(path)!r}")


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
