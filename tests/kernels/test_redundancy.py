"""Which keys resemble which, against all cosines at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvpolicy import reference
from kvpolicy.kernels import redundancy as kernels
from tests.support.kernels.pool import CUDA, DEVICE


def keys_of(units, width, dim, dtype, axes=7, seed=0):
    """Some near one of a few directions, some near none."""
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(axes, dim, generator=rng)
    found = base[torch.randint(axes, (units, width), generator=rng)]
    found = found + 0.2 * torch.randn(units, width, dim, generator=rng)
    found[:, ::5] = torch.randn(units, len(range(0, width, 5)), dim, generator=rng)
    return F.normalize(found, dim=-1).to(dtype).to(DEVICE)


def formula(keys, lengths, threshold):
    """The last other key with a larger cosine, and how near the threshold any cosine is."""
    cosine = keys.double() @ keys.double().mT
    place = torch.arange(keys.shape[1], device=DEVICE)
    counts = place < lengths[:, None]
    counts = counts[:, None] & counts[:, :, None] & (place != place[:, None])
    near = (cosine - threshold).abs().masked_fill(~counts, 1.0).min()
    found = torch.where((cosine > threshold) & counts, place, -1).amax(-1)
    return found, float(near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("width", "dim"), [(130, 20), (200, 64), (1, 16)])
def test_the_last_similar_key(width, dim, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "_TILES", 2)
    keys = keys_of(3, width, dim, dtype)
    lengths = torch.tensor([width, width // 2, 0], device=DEVICE)
    wanted, near = formula(keys, lengths, 0.613)
    assert near > 1e-6 or width == 1
    held = torch.arange(width, device=DEVICE) < lengths[:, None]
    for op in (kernels.last_similar, reference.last_similar):
        got = op(keys, lengths, 0.613)
        assert got.dtype == torch.int32 and torch.equal(got[held], wanted[held].int())
        assert (got[~held] == -1).all()
    if width > 100:
        assert (wanted[0] >= 0).any() and (wanted[0] < 0).any()


def test_keys_without_a_similar_one_are_looked_for_to_the_first(monkeypatch):
    """Only the first key resembles the last: everything between is looked at."""
    monkeypatch.setattr(kernels, "_TILES", 2)
    keys = torch.eye(96, device=DEVICE)[None].repeat(1, 2, 1)[:, :150]
    keys[:, 96:] = F.normalize(torch.ones(96, device=DEVICE), dim=0)
    keys[0, -1] = keys[0, 0]
    for op in (kernels.last_similar, reference.last_similar):
        found = op(keys, torch.tensor([150], device=DEVICE), 0.9)[0].tolist()
        assert found[0] == 149 and found[-1] == 0 and set(found[1:96]) == {-1}
        assert found[100] == 148 and found[148] == 147


@pytest.mark.skipif(not CUDA, reason="slow in the interpreter")
@pytest.mark.parametrize("dim", [128, 256, 512])
def test_many_keys(dim):
    keys = keys_of(2, 3000, dim, torch.bfloat16)
    lengths = torch.tensor([3000, 1777], device=DEVICE)
    wanted, near = formula(keys, lengths, 0.613)
    got = kernels.last_similar(keys, lengths, 0.613)
    assert near > 0
    held = torch.arange(3000, device=DEVICE) < lengths[:, None]
    assert (got == wanted)[held].float().mean() > 0.999  # but for what rounding decides


@pytest.mark.parametrize("blocks", [(7, 40), (512, 16)])
def test_a_block_of_the_reference_is_small(blocks, monkeypatch):
    module = __import__("kvpolicy.reference.redundancy", fromlist=["_ROWS"])
    keys, lengths = keys_of(2, 90, 16, torch.float32), torch.tensor([90, 60])
    whole = module.last_similar(keys.cpu(), lengths, 0.5)
    monkeypatch.setattr(module, "_ROWS", blocks[0])
    monkeypatch.setattr(module, "_COLUMNS", blocks[1])
    assert torch.equal(module.last_similar(keys.cpu(), lengths, 0.5), whole)
