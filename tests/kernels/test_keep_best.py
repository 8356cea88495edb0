"""The best tokens of each head equal a sort, whether one program holds a head or many do."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import reference
from kvpolicy.kernels import keep_best
from tests.support.kernels.pool import DEVICE

INF = float("inf")


def scores_of(length: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Heads `[2, 3, N]`: normal, coarse, all equal, with both infinities, both zeros, tiny."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(6, length, generator=rng)
    scores[1] = (2 * scores[1]).round()
    scores[2] = 0.25
    chance = torch.rand(length, generator=rng)
    scores[3, chance < 0.3], scores[3, chance > 0.8] = -INF, INF
    scores[4] = torch.where(chance < 0.5, -0.0, 0.0)
    scores[5] *= 1e-6
    return scores.to(dtype).view(2, 3, length)


def agree(length: int, dtype: torch.dtype, seed: int, most: int = 4) -> None:
    scores = scores_of(length, dtype, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    valid = torch.rand(scores.shape, generator=rng) < 0.8
    valid[0, 0] = True
    some = (torch.rand(2, 3, generator=rng) * length).long()
    for amount in (some, some.int() + length // 2, some * 0, some + length)[:most]:
        want = reference.keep_best(scores, valid, amount)
        given = (x.to(DEVICE) for x in (scores, valid, amount))
        assert torch.equal(keep_best.keep_best(*given).cpu(), want)
        # By hand: a stable sort of the latest tokens first.
        for head, ok, wanted, marked in zip(
            scores.flatten(0, 1).tolist(), valid.flatten(0, 1).tolist(),
            amount.flatten().tolist(), want.flatten(0, 1), strict=True,
        ):  # fmt: skip
            order = sorted((-head[n], -n) for n in range(length) if ok[n])[:wanted]
            assert marked.nonzero().flatten().tolist() == sorted(-n for _, n in order)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [(1, torch.float32), (200, torch.float32), (129, torch.bfloat16), (90, torch.float64)],
)
def test_one_program_a_head(length: int, dtype: torch.dtype) -> None:
    agree(length, dtype, seed=length)


@pytest.mark.parametrize(("length", "dtype"), [(150, torch.float32), (70, torch.float64)])
def test_many_programs_a_head(length: int, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(keep_best, "_CHUNK", 64)
    agree(length, dtype, seed=length, most=2)


@pytest.mark.parametrize("length", [40, 150])
@pytest.mark.parametrize("amount", [1 << 31, (1 << 32) + 6, 8 * 10**9])
def test_a_budget_beyond_32_bits_keeps_all(length: int, amount: int, monkeypatch) -> None:
    monkeypatch.setattr(keep_best, "_CHUNK", 64)
    valid = torch.arange(length, device=DEVICE).expand(1, 2, -1) % 5 > 0
    amounts = torch.full((1, 2), amount, device=DEVICE)
    got = keep_best.keep_best(torch.rand(1, 2, length, device=DEVICE), valid, amounts)
    assert torch.equal(got, valid)


@pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 5)])
def test_nothing_to_keep(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(shape, device=DEVICE)
    amount = torch.ones(shape[:2], dtype=torch.int64, device=DEVICE)
    for op in (keep_best.keep_best, reference.keep_best):
        assert op(empty, empty > 0, amount).shape == shape


def test_views_and_nan_stay_inside() -> None:
    """A column of amounts, every second score; NaN may go anywhere, but not out of bounds."""
    scores = scores_of(80, torch.float32, 5)[..., ::2].to(DEVICE)
    valid = torch.ones(2, 3, 80, device=DEVICE).bool()[..., ::2]
    amount = torch.tensor([[7], [90]], device=DEVICE).expand(2, 3)
    want = reference.keep_best(scores.cpu(), valid.cpu(), amount.cpu())
    assert torch.equal(keep_best.keep_best(scores, valid, amount).cpu(), want)
    assert keep_best.keep_best(scores * float("nan"), valid, amount).shape == valid.shape
