"""The write gate against a plain float64 formula and against the published convolutions."""

from __future__ import annotations

import math

import attrs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy.admission import WriteGate
from kvpolicy.admission._threshold import rounded


def make_gate(layers=2, heads=3, dim=16, width=24, dtype=torch.float32, **kwargs):
    rng = torch.Generator().manual_seed(2)

    def random(*shape):
        return (torch.randn(*shape, generator=rng) * 0.4).to(dtype)

    return WriteGate(
        norm_pre=1 + random(layers, dim),
        norm_post=1 + random(layers, dim),
        w1=random(layers, heads, width, 2 * dim),
        b1=random(layers, heads, width),
        w2=random(layers, heads, width),
        b2=random(layers, heads),
        **kwargs,
    )


def constant_gate(values):
    """A gate whose score is `values[head]` for every token."""
    heads = len(values)
    logits = [math.log(v / (1 - v)) for v in values]
    return WriteGate(
        norm_pre=torch.ones(1, 4),
        norm_post=torch.ones(1, 4),
        w1=torch.zeros(1, heads, 2, 8),
        b1=torch.zeros(1, heads, 2),
        w2=torch.zeros(1, heads, 2),
        b2=torch.tensor([logits]),
    )


def norm(x, weight):
    scale = 1 / math.sqrt(sum(c * c for c in x) / len(x) + 1e-6)
    return [w * c * scale for w, c in zip(weight, x, strict=True)]


def score_by_hand(gate, write, head, token):
    """The formula on Python floats."""
    pick = {name: getattr(gate, name)[write.layer].tolist() for name in ("norm_pre", "norm_post")}
    u = norm(write.key_pre[head, token].tolist(), pick["norm_pre"])
    u += norm(write.key[head, token].tolist(), pick["norm_post"])
    z = gate.b2[write.layer, head].item()
    for unit in range(gate.width):
        row = gate.w1[write.layer, head, unit].tolist()
        a = gate.b1[write.layer, head, unit].item() + sum(
            w * c for w, c in zip(row, u, strict=True)
        )
        gelu = a * 0.5 * (1 + math.erf(a / math.sqrt(2)))
        z += gate.w2[write.layer, head, unit].item() * gelu
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_are_the_formula(make_write, layer):
    gate, write = make_gate(), make_write(tokens=5, layer=layer)
    wanted = [[score_by_hand(gate, write, h, t) for t in range(5)] for h in range(3)]
    assert torch.allclose(gate.scores(write).double(), torch.tensor(wanted).double(), atol=1e-6)
    wide = gate.place(torch.device("cpu"), torch.float64, "reference")
    scores = wide.scores(make_write(tokens=5, layer=layer, dtype=torch.float64))
    assert torch.allclose(scores, torch.tensor(wanted, dtype=torch.float64), atol=1e-12)


def test_scores_are_the_published_convolutions(make_write):
    gate, write = make_gate(heads=4, dim=32, width=48), make_write(kv_heads=4, dim=32, tokens=33)
    pre = F.rms_norm(write.key_pre, (32,), gate.norm_pre[0], eps=1e-6)
    post = F.rms_norm(write.key, (32,), gate.norm_post[0], eps=1e-6)
    rows = torch.cat([pre, post], -1).transpose(1, 2).reshape(1, 4 * 64, 33)
    hidden = F.conv1d(rows, gate.w1[0].reshape(4 * 48, 64, 1), gate.b1[0].flatten(), groups=4)
    logit = F.conv1d(F.gelu(hidden), gate.w2[0][..., None], gate.b2[0], groups=4)
    assert torch.allclose(gate.scores(write), logit[0].sigmoid(), atol=1e-6)


@pytest.mark.parametrize(("width", "count"), [(512, 1_057_032), (192, 396_552)])
def test_published_sizes_have_the_published_parameter_counts(width, count):
    gate = make_gate(layers=1, heads=8, dim=128, width=width)
    tensors = [getattr(gate, field.name) for field in attrs.fields(WriteGate)]
    assert sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)) == count


@pytest.mark.parametrize(
    ("inclusive", "wanted"), [(False, [False, False, True]), (True, [False, True, True])]
)
def test_bf16_scores_meet_a_bf16_threshold(make_write, inclusive, wanted):
    values = [0.099609375, 0.10009765625, 0.1005859375]
    gate = attrs.evolve(constant_gate(values), threshold=0.1, inclusive=inclusive)
    write = make_write(tokens=2, dim=4, dtype=torch.bfloat16)
    assert gate.scores(write)[:, 0].tolist() == values
    assert gate.admit(write).tolist() == [[w, w] for w in wanted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_score_at_the_threshold_is_admitted_only_inclusively(make_write, dtype):
    write = make_write(tokens=40, kv_heads=2, dim=64, dtype=dtype)
    gate = make_gate(heads=2, dim=64).place(torch.device("cpu"), dtype, "reference")
    scores = gate.scores(write)
    limit = scores[1, 7].item()
    strict, loose = (
        attrs.evolve(gate, threshold=limit, inclusive=inclusive).admit(write)
        for inclusive in (False, True)
    )
    assert strict.dtype == loose.dtype == torch.bool
    assert torch.equal(strict, scores > limit) and torch.equal(loose, scores >= limit)
    assert loose[1, 7] and not strict[1, 7] and strict.any() and not strict.all()


@settings(deadline=None, derandomize=True)
@given(
    value=st.floats(-1e4, 1e4).filter(lambda x: abs(x) > 1e-4 or x == 0),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_rounded_is_the_dtype_of_torch(value, dtype):
    assert rounded(value, dtype) == torch.tensor(value, dtype=dtype).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_scores_do_not_depend_on_the_cut(make_write, cut, dtype, size):
    gate = make_gate(heads=2, dim=64, width=96, dtype=dtype)
    write = make_write(tokens=150, kv_heads=2, dim=64, dtype=dtype)
    parts = [gate.scores(cut(write, n, min(n + size, 150))) for n in range(0, 150, size)]
    assert torch.equal(torch.cat(parts, 1), gate.scores(write))


def test_a_shard_of_heads_scores_as_the_whole(make_write):
    gate = make_gate(heads=4)
    whole = gate.scores(make_write(kv_heads=4, layer=1))
    shard = gate.scores(make_write(kv_heads=4, layer=1, heads=range(1, 3)))
    assert torch.equal(shard, whole[1:3])
    assert len({tuple(row) for row in whole.tolist()}) == 4


def test_no_tokens_give_no_decisions(make_write, cut):
    assert make_gate().admit(cut(make_write(), 0, 0)).shape == (3, 0)


def test_place_casts_a_copy(make_write):
    gate = make_gate(threshold=0.3)
    placed = gate.place(torch.device("cpu"), torch.bfloat16, "auto")
    assert (placed.w1.dtype, gate.w1.dtype) == (torch.bfloat16, torch.float32)
    assert (placed.backend, placed.threshold, placed.window) == ("reference", 0.3, 256)
    assert placed.scores(make_write(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_keys_before_rope_are_needed(make_write):
    assert make_gate().needs == {"key_pre"}
    with pytest.raises(ValueError, match="key_pre"):
        make_gate().admit(make_write()._replace(key_pre=None))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 3, 16), r"layers=2.*layers=3"),
        ((2, 4, 16), r"kv_heads=3.*kv_heads=4"),
        ((2, 3, 8), r"head_dim=16.*head_dim=8"),
    ],
)
def test_check_names_both_numbers(sizes, message):
    make_gate().check(2, 3, 16)
    with pytest.raises(ValueError, match=message):
        make_gate().check(*sizes)


@pytest.mark.parametrize("name", ["norm_post", "b1", "w2", "b2", "w1"])
def test_weights_fit_each_other(name):
    gate = make_gate()
    with pytest.raises(ValueError, match=f"^{name}.*wanted shape"):
        attrs.evolve(gate, **{name: getattr(gate, name)[..., 1:].contiguous()})
    with pytest.raises(TypeError, match="wanted floats of w1's dtype"):
        attrs.evolve(gate, **{name: getattr(gate, name).double()})


def test_a_gate_is_frozen_and_equal_to_itself_only():
    gate, twin = make_gate(), make_gate()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        gate.threshold = 0.2
    assert gate != twin
    assert len({gate, twin, gate}) == 2
    assert repr(gate) == (
        "WriteGate(threshold=0.1, inclusive=False, window=256, activation='gelu')"
    )
