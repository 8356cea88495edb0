from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpolicy.adapters.hf import training_attention
from kvpolicy.training import flash
from kvpolicy.training.objective import (
    answer_loss,
    distillation_loss,
    gated_attention,
    kept_fraction,
    log_gate,
    memory_cost,
)


@pytest.mark.parametrize(
    ("length", "gate", "want"),
    [
        (512, 0.0, 0.846086),
        (512, 0.5, 0.961521),
        (4096, 0.0, 0.235672),
        (4096, 0.5, 0.808918),
        (32768, 0.0, 0.045704),
        (32768, 0.5, 0.761426),
        (4096, 1.0, 1.0),
    ],
)
def test_memory_cost_known_values(length: int, gate: float, want: float) -> None:
    cost = memory_cost(torch.full((2, 3, length), gate), 256)
    assert cost.item() == pytest.approx(want, abs=2e-6)


def test_memory_cost_ignores_the_last_window() -> None:
    gate = torch.full((20,), 0.5, requires_grad=True)
    memory_cost(gate, 8).backward()
    assert gate.grad is not None
    assert (gate.grad[-8:] == 0).all() and (gate.grad[:-8] > 0).all()


def test_kept_fraction_counts_the_window_once() -> None:
    gate = torch.tensor([0.9, 0.1, 0.2, 0.0, 0.9, 0.9])
    assert kept_fraction(gate, window=2, threshold=0.1).item() == pytest.approx(4 / 6)
    assert kept_fraction(gate, window=9, threshold=0.1).item() == 1.0


def test_distillation_loss_is_the_mean_over_all_elements() -> None:
    student, teacher = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    student[0, 0, 0] = 6.0
    assert distillation_loss(student, teacher).item() == pytest.approx(36 / 24)


def test_answer_loss_weighs_every_sequence_with_answers_alike() -> None:
    student, teacher = torch.zeros(3, 5, 2), torch.zeros(3, 5, 2)
    student[0, 1] = 2.0  # predicts token 2, the only answer: 4
    student[1, 2] = 3.0  # one of two predictions: 9 / 2
    student[:, 4] = 9.0  # nothing follows it
    student[2] = 9.0  # asks nothing
    answers = torch.zeros(3, 5, dtype=torch.bool)
    answers[0, 2] = answers[1, 3] = answers[1, 4] = True
    found = answer_loss(student, teacher, answers)
    assert found is not None and found.item() == pytest.approx((4 + 9 / 2) / 2)
    assert answer_loss(student, teacher, torch.zeros_like(answers)) is None


def _inputs(length: int, group: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(heads: int) -> Tensor:
        x = torch.randn(2, heads, length, 16, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    gate = torch.rand(2, 2, length, generator=generator, dtype=torch.float64)
    return normal(2 * group), normal(2), normal(2), gate


def _oracle(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, window: int,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Weights g_j exp(s_ij) outside the window, one query at a time."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for i in range(query.shape[2]):
        near = torch.arange(i + 1) > i - window
        k, v, w = (t[:, :, : i + 1].repeat_interleave(group, 1) for t in (key, value, weight))
        score = (query[:, :, i : i + 1] * k).sum(-1) * 0.3
        if softcap is not None:
            score = softcap * (score / softcap).tanh()
        part = score.exp() * torch.where(near, torch.ones_like(w), w)
        whole = part.sum(-1, keepdim=True)
        if sinks is not None:
            whole = whole + sinks.exp()[:, None]
        rows.append((part[..., None] * v).sum(2) / whole)
    return torch.stack(rows, 2)


SINKS = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
ASKED = [{"softcap": 1.5}, {"sinks": SINKS}, {"softcap": 0.7, "sinks": SINKS}]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("tile", [7, 64])
def test_softcap_and_sinks_are_the_definition(
    asked: dict, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_attention, "TILE", tile)
    query, key, value, gate = _inputs(40)
    value = value[..., :10]  # of another size than keys
    bias = gate.requires_grad_()
    leaves = (query, key, value, bias)
    probe = torch.randn(2, 6, 40, 10, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for out in (
        gated_attention(query, key, value, log_gate(gate), window=5, scale=0.3, **asked),
        _oracle(query, key, value, gate, 5, **asked),
    ):
        results.append([out, *torch.autograd.grad((out * probe).sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    plain = _oracle(query, key, value, gate, 5)
    assert (results[0][0] - plain).abs().max() > 0.1


@pytest.mark.parametrize("window", [1, 5, 39, 40, 64])
def test_dense_kernel_is_the_definition(window: int) -> None:
    query, key, value, gate = _inputs(40)
    got = gated_attention(query, key, value, log_gate(gate), window=window, scale=0.3)
    torch.testing.assert_close(got, _oracle(query, key, value, gate, window))


def test_hard_gate_is_the_exact_sparse_mask() -> None:
    query, key, value, gate = _inputs(40)
    got = gated_attention(query, key, value, log_gate(gate, 0.5), window=7, scale=0.3)
    admitted = (gate > 0.5).double()
    torch.testing.assert_close(got, _oracle(query, key, value, admitted, 7))


def test_open_gates_are_dense_attention() -> None:
    query, key, value, gate = _inputs(40)
    got = gated_attention(query, key, value, log_gate(torch.ones_like(gate)), window=4, scale=0.3)
    want = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(got, want)


def _plain_scores(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    hidden = (distance < 0) | (distance >= (window or q.shape[1]))
    return (torch.einsum("bihd,bjhd->bhij", q, k) * scale).masked_fill(hidden, -torch.inf)


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None):
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    score = _plain_scores(q, k, scale, window)
    out = torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)
    return out, score.logsumexp(-1), (torch.zeros(1), torch.zeros(1))


def _plain_backward(grad, q, k, v, out, lse, rng, scale, window):  # noqa: ANN001, ANN202
    heads = k.shape[2]
    k, v = (t.repeat_interleave(q.shape[2] // heads, 2) for t in (k, v))
    p = (_plain_scores(q, k, scale, window) - lse[..., None]).exp()
    inner = (grad * out).sum(-1).transpose(1, 2)[..., None]
    ds = p * (torch.einsum("bihd,bjhd->bhij", grad, v) - inner) * scale
    dk, dv = torch.einsum("bhij,bihd->bjhd", ds, q), torch.einsum("bhij,bihd->bjhd", p, grad)
    dk, dv = (t.unflatten(2, (heads, -1)).sum(3) for t in (dk, dv))
    return torch.einsum("bhij,bjhd->bihd", ds, k), dk, dv


@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("window", [5, 39, 40, 64])
def test_merged_flash_calls_equal_the_dense_kernel(
    window: int, sinks: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "flash_forward", _plain_forward)
    monkeypatch.setattr(flash, "flash_backward", _plain_backward)
    query, key, value, gate = _inputs(40)
    bias = log_gate(0.05 + 0.9 * gate).requires_grad_()
    value = value if sinks is None else value[..., :10]  # fewer channels than keys
    leaves = (query, key, value, bias)
    probe = torch.randn(2, 6, 40, value.shape[-1], generator=torch.Generator().manual_seed(1))
    results = []
    for kernel in ("dense", "flash"):
        out = gated_attention(*leaves, window=window, scale=0.3, sinks=sinks, kernel=kernel)  # type: ignore[arg-type]
        results.append([out, *torch.autograd.grad((out * probe).sum(), leaves)])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # ln g passes fp32
    assert window >= 40 or results[0][4].abs().max() > 1e-3


def test_gated_attention_rejects_what_it_does_not_know() -> None:
    query, key, value, gate = _inputs(4)
    with pytest.raises(ValueError, match="window: wanted at least 1, got 0"):
        gated_attention(query, key, value, gate, window=0, scale=1.0)
    with pytest.raises(ValueError, match="got 'eager'"):
        gated_attention(query, key, value, gate, window=1, scale=1.0, kernel="eager")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no gradients with a softcap"):
        gated_attention(query, key, value, gate, window=1, scale=1.0, softcap=9.0, kernel="flash")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("asked", [{}, *ASKED])
@pytest.mark.parametrize("kernel", ["flex", "flash"])
def test_kernels_of_a_gpu_equal_the_definition(kernel: str, asked: dict) -> None:
    if kernel == "flash" and "softcap" in asked:
        return
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (1, 6, 300, 64), (1, 2, 300, 64), (1, 2, 300, 64), (1, 2, 300)
    made = [torch.randn(x, generator=generator, device="cuda") for x in shapes]
    made = [x.bfloat16() for x in made[:3]] + [made[3].sigmoid()]
    asked = {k: v.cuda().float() if k == "sinks" else v for k, v in asked.items()}
    probe = torch.randn(1, 6, 300, 64, generator=generator, device="cuda")
    found = []
    for kind, dtype in ((kernel, torch.bfloat16), ("dense", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in made[:3]]
        leaves.append(made[3].to(torch.promote_types(dtype, torch.float32)).requires_grad_())
        bias = log_gate(leaves[3])
        out = gated_attention(*leaves[:3], bias, window=40, scale=0.3, kernel=kind, **asked)
        found.append([out, *torch.autograd.grad((out * probe).sum(), leaves)])
    for got, want in zip(*found, strict=True):
        assert (got.double() - want.double()).norm() < 2e-2 * want.double().norm()
