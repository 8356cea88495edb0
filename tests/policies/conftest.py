"""Inputs that the tests of policies share."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import Write


@pytest.fixture
def make_write():
    """Makes a Write of random keys; `cut` takes a slice of tokens, `heads` a shard."""

    def make(tokens=40, kv_heads=3, dim=16, layer=0, heads=None, dtype=torch.float32, start=0):
        rng = torch.Generator().manual_seed(5)
        key, key_pre, value = (
            torch.randn(kv_heads, tokens, dim, generator=rng).to(dtype) for _ in range(3)
        )
        heads = range(kv_heads) if heads is None else heads
        rows = slice(heads.start, heads.stop)
        return Write(
            key=key[rows],
            value=value[rows],
            positions=torch.arange(start, start + tokens),
            cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
            layer=layer,
            heads=heads,
            key_pre=key_pre[rows],
        )

    return make


@pytest.fixture
def cut():
    """Takes tokens `low:high` of a Write."""

    def take(write, low, high):
        return write._replace(
            key=write.key[:, low:high],
            value=write.value[:, low:high],
            key_pre=write.key_pre[:, low:high],
            positions=write.positions[low:high],
            cu_seqlens=torch.tensor([0, high - low], dtype=torch.int32),
        )

    return take


@pytest.fixture
def gate_state():
    """A state dict in the published layout of the write gate."""

    def make(layers=2, heads=3, dim=16, width=24):
        rng = torch.Generator().manual_seed(1)
        shapes = {
            "pre_key_norm.weight": (dim,),
            "post_key_norm.weight": (dim,),
            "conv1.weight": (heads * width, 2 * dim, 1),
            "conv1.bias": (heads * width,),
            "conv2.weight": (heads, width, 1),
            "conv2.bias": (heads,),
        }
        return {
            f"model.layers.{n}.self_attn.g_predictors.{name}": torch.nn.Parameter(
                torch.randn(shape, generator=rng) * (0.3 if "weight" in name else 1.0)
            )
            for n in range(layers)
            for name, shape in shapes.items()
        }

    return make
