from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from kvpolicy.admission._gate_file import named, stack
from kvpolicy.training.gate import FLOOR, WriteGates

HEADS, DIM, WIDTH = 2, 8, 12


@pytest.fixture
def gates() -> WriteGates:
    torch.manual_seed(0)
    gates = WriteGates(layers=2, kv_heads=HEADS, head_dim=DIM, expand=1.5)
    for layer in gates.layers:
        torch.nn.init.normal_(layer.pre_key_norm.weight)
    return gates


def test_published_names_and_shapes(gates: WriteGates) -> None:
    shapes = {name: tuple(value.shape) for name, value in named(gates.fields()).items()}
    want = {
        "pre_key_norm.weight": (DIM,),
        "post_key_norm.weight": (DIM,),
        "conv1.weight": (HEADS * WIDTH, 2 * DIM, 1),
        "conv1.bias": (HEADS * WIDTH,),
        "conv2.weight": (HEADS, WIDTH, 1),
        "conv2.bias": (HEADS,),
    }
    assert shapes == {
        f"model.layers.{n}.self_attn.g_predictors.{name}": shape
        for n in range(2)
        for name, shape in want.items()
    }


@pytest.mark.parametrize(("expand", "count"), [(4.0, 1_057_032), (1.5, 396_552)])
def test_parameter_count_of_released_gates(expand: float, count: int) -> None:
    gates = WriteGates(layers=1, kv_heads=8, head_dim=128, expand=expand)
    assert sum(p.numel() for p in gates.parameters()) == count


def test_gate_is_the_grouped_convolution(gates: WriteGates) -> None:
    torch.manual_seed(1)
    pre, post = torch.randn(2, 3, HEADS, 5, DIM).unbind(0)
    layer = gates.layers[1]

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * F.rms_norm(x, (DIM,), eps=1e-6)

    both = [norm(pre, layer.pre_key_norm.weight), norm(post, layer.post_key_norm.weight)]
    x = torch.cat(both, -1).transpose(2, 3).flatten(1, 2)  # [B, H * 2D, N], head-major
    want = layer.conv2(F.gelu(layer.conv1(x))).sigmoid()
    torch.testing.assert_close(layer(pre, post), want, atol=1e-6, rtol=1e-6)


def test_gate_has_a_floor(gates: WriteGates) -> None:
    with torch.no_grad():
        gates.layers[0].conv2.bias.fill_(-50)
    key = torch.randn(1, HEADS, 3, DIM)
    assert (gates.layers[0](key, key) == FLOOR).all()


def test_files_hold_the_same_gates(gates: WriteGates, tmp_path: Path) -> None:
    gates.save(tmp_path / "gate.pt")
    gates.save(tmp_path / "gate.safetensors", metadata={"window": "64"})
    plain = torch.load(tmp_path / "gate.pt", weights_only=True)
    with safe_open(tmp_path / "gate.safetensors", "pt") as file:
        assert file.metadata() == {"window": "64"}
        assert sorted(file.keys()) == sorted(plain)
        assert all(torch.equal(file.get_tensor(name), plain[name]) for name in plain)
    copy = WriteGates(layers=2, kv_heads=HEADS, head_dim=DIM, expand=1.5)
    copy.load_fields(stack(plain, "here"))
    assert all(
        torch.equal(a, b) for a, b in zip(copy.parameters(), gates.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match=r"path: .*\.pt or \.safetensors"):
        gates.save(tmp_path / "gate.bin")
    with pytest.raises(ValueError, match=r"here: unexpected key model\.layers\.9\.x"):
        stack({**plain, "model.layers.9.x": torch.zeros(1)}, "here")
