"""write_gate: float64 within the budget, and scores that do not depend on the cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kvpolicy import reference
from kvpolicy.kernels.write_gate import _gelu, write_gate
from tests.support.kernels.gate import weights
from tests.support.kernels.pool import DEVICE, NAN, assert_within_budget, randn

CUDA = DEVICE.type == "cuda"


def oracle(pre, key, norm_pre, norm_post, w1, b1, w2, b2, activation=F.gelu):
    def norm(x, weight):
        wide = x.float() if x.dtype != torch.float64 else x
        wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return weight * wide.to(x.dtype)

    x = torch.cat([norm(pre, norm_pre), norm(key, norm_post)], -1)
    hidden = activation(torch.einsum("htd,hmd->htm", x, w1) + b1[:, None])
    return ((hidden * w2[:, None]).sum(-1) + b2[:, None]).sigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "dim", "hidden"),
    [(1, 64, 100), (63, 80, 64), (65, 20, 33), (100, 128, 70), (3, 256, 40), (3, 320, 20)],
)
def test_write_gate(tokens: int, dim: int, hidden: int, dtype: torch.dtype) -> None:
    parts = weights(2, dim, hidden, dtype)
    pre = randn(tokens, 2, dim, dtype=dtype, seed=7).transpose(0, 1)
    key = 3 * randn(2, tokens, dim, dtype=dtype, seed=8)
    got = write_gate(pre, key, *parts)
    assert got.dtype == dtype
    exact = oracle(*(x.double() for x in (pre, key, *parts)))
    assert_within_budget(got, oracle(pre, key, *parts), exact)
    assert exact.max() - exact.min() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gates_with_silu(dtype: torch.dtype) -> None:
    parts = weights(2, 32, 40, dtype)
    pre, key = (3 * randn(2, 33, 32, dtype=dtype, seed=s) for s in (7, 8))
    exact = oracle(*(x.double() for x in (pre, key, *parts)), activation=F.silu)
    low = oracle(pre, key, *parts, activation=F.silu)
    assert_within_budget(write_gate(pre, key, *parts, silu=True), low, exact)
    assert_within_budget(reference.write_gate(pre, key, *parts, silu=True), low, exact)
    assert (write_gate(pre, key, *parts) - low).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_do_not_depend_on_the_cut(dtype: torch.dtype) -> None:
    tokens, dim = (4096, 128) if CUDA else (67, 48)
    parts = weights(2, dim, 160, dtype)
    pre, key = (randn(2, tokens, dim, dtype=dtype, seed=s) for s in (7, 8))
    whole = write_gate(pre, key, *parts)
    cuts = [0, 1, 2, 35, tokens - 1, tokens]
    cut = [
        write_gate(pre[:, a:b], key[:, a:b], *parts) for a, b in zip(cuts, cuts[1:], strict=False)
    ]
    assert torch.equal(torch.cat(cut, 1), whole)
    # Neither on the strides of the keys, nor on what other tokens hold.
    across = key.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(write_gate(pre, across, *parts), whole)
    key[:, 1:] = NAN
    assert torch.equal(write_gate(pre, key, *parts)[:, 0], whole[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decisions_are_scores_above_the_limit(dtype: torch.dtype) -> None:
    parts = weights(2, 32, 40, dtype)
    key = randn(2, 70, 32, dtype=dtype, seed=7)
    scores = write_gate(key, key, *parts)
    limit = scores[1, 13].item()
    strict, loose = (write_gate(key, key, *parts, limit, inclusive) for inclusive in (False, True))
    assert strict.dtype == loose.dtype == torch.bool
    assert torch.equal(strict, scores > limit) and torch.equal(loose, scores >= limit)
    assert strict.any() and not strict.all() and not torch.equal(strict, loose)
    assert strict.view(torch.uint8).max() == 1  # flags are the bytes of decisions
    alone = [write_gate(key[:, n : n + 1], key[:, n : n + 1], *parts, limit) for n in (0, 13, 69)]
    assert torch.equal(torch.cat(alone, 1), strict[:, [0, 13, 69]])
    assert not write_gate(key, key, *parts, 1.0).any()
    assert write_gate(key[:, :0], key[:, :0], *parts, limit).dtype == torch.bool
    mine = reference.write_gate(key, key, *parts)
    for inclusive, wanted in ((False, mine > limit), (True, mine >= limit)):
        assert torch.equal(reference.write_gate(key, key, *parts, limit, inclusive), wanted)


@triton.jit
def _gelus(x, out, like, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out + n, _gelu(tl.load(x + n), like.dtype.element_ty))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-7), (torch.bfloat16, 7e-7)])
def test_gelu(dtype: torch.dtype, error: float) -> None:
    x = torch.cat([torch.linspace(-9, 9, 3 << 10), torch.logspace(-4, 6, 512)])
    x = torch.cat([x, -x[-512:]]).to(DEVICE)
    out = torch.empty_like(x)
    _gelus[1,](x, out, torch.empty(1, dtype=dtype, device=DEVICE), N=4096)
    exact = F.gelu(x.double())
    # Above 3 the rounding of the result is larger than the error.
    assert ((out.double() - exact).abs() <= error + 1.2e-7 * exact.abs()).all()


def test_mixed_dtypes_no_tokens_and_float64() -> None:
    parts = weights(1, 32, 20, torch.float32)
    key = randn(1, 5, 32, dtype=torch.bfloat16, seed=9)
    got = write_gate(key, key, *parts)
    exact = oracle(*(x.double() for x in (key, key, *parts)))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, atol=4e-3, rtol=0)
    assert write_gate(key[:, :0], key[:, :0], *parts).shape == (1, 0)
    with pytest.raises(TypeError, match=r"key is torch\.float64"):
        write_gate(key.double(), key.double(), *parts)
