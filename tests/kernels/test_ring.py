"""advance_ring: a loop over tokens decides, and the reference agrees with it as with the kernel."""

from __future__ import annotations

import pytest
import torch

from kvpolicy.ops import Ring, Segments, load
from tests.support.kernels.mirror import Size
from tests.support.kernels.op_cases import CASES
from tests.support.kernels.pool import DEVICE
from tests.support.kernels.prompt_cases import segments_of

SLOTS, HEADS = 5, 2


def written(ring: Ring, tokens: tuple[torch.Tensor, ...], segments) -> list[list[list[int]]]:
    """Which token a loop finds in each slot and among the recent ones; tokens from 1000 are new."""
    rings, recent = [], []
    for row, start in enumerate(segments.start):
        slots = [100 * row + slot for slot in range(SLOTS)]
        new = segments.cu_q[row + 1] - segments.cu_q[row]
        count = segments.cu_k[row + 1] - segments.cu_k[row] - new
        recent += [slots[at % SLOTS] for at in range(start - count, start)]
        for i in range(new):
            recent.append(1000 + segments.cu_q[row] + i)
            slots[(start + i) % SLOTS] = recent[-1]
        rings.append(slots)
    return [rings, [recent]]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("starts", "new", "old"),
    [([0], [3], [0]), ([0], [12], [0]), ([7, 3, 30], [2, 0, 9], [4, 0, 5]), ([4], [1], [4])],
)
def test_a_loop_finds_the_same(backend: str, starts, new, old) -> None:
    segments = segments_of(starts, new, [a + b for a, b in zip(old, new, strict=True)])
    if backend == "triton":
        segments = Segments(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in segments))
    names = (torch.arange(SLOTS) + 100 * torch.arange(len(starts))[:, None])[:, None]
    names = names.expand(-1, HEADS, -1)
    given = 1000 + torch.arange(sum(new)).expand(HEADS, -1)
    channels = torch.arange(16) / 16
    ring = Ring(*(names[..., None] + channels + n for n in (0, 7)), (names % 4).byte())
    tokens = (*(given[..., None] + channels + n for n in (0, 7)), (given % 4).byte())
    tokens = tuple(x.contiguous() for x in tokens)
    if backend == "triton":
        ring, tokens = Ring(*(x.to(DEVICE) for x in ring)), tuple(x.to(DEVICE) for x in tokens)
    saved = Ring(*(x.clone() for x in ring))
    recent, before = load(backend).advance_ring(ring, *tokens, segments, undo=True)
    made = written(ring, tokens, segments)
    slots, kept = (torch.tensor(x, device=ring.k.device)[:, None] for x in made)
    for found, want in ((ring, slots), (recent, kept[0])):
        shape = found.k.shape[:-1]
        assert torch.equal(found.k[..., 0], want.expand(shape).float())
        assert torch.equal(
            found.v[..., 1] - found.k[..., 1], torch.full(shape, 7.0, device=found.k.device)
        )
        assert torch.equal(found.flags, (want % 4).byte().expand(shape))
    assert all(torch.equal(a, b) for a, b in zip(before, saved, strict=True))


@pytest.mark.parametrize("size", [Size(dim=20, dim_v=12, page=4, dtype=torch.bfloat16, group=1)])
def test_both_backends_agree(size: Size) -> None:
    CASES["advance_ring"](size)
