"""Float16 where q.k exceeds its range: what is rounded has been scaled, in every op with a q.k."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpolicy import CachePipeline, CacheSpec, EvictionView
from kvpolicy.eviction import SnapKV
from kvpolicy.kernels import sparse_prefill as sparse
from kvpolicy.ops import Heads, Pages, Ring, load
from tests.support.kernels.mirror import Mirror, Pair, Size, both, make_mirror
from tests.support.kernels.pool import CUDA, DEVICE
from tests.support.kernels.prompt_cases import segments_of

DIM, WINDOW, SCALE = 128, 4, 128**-0.5
# Keys and queries near these: q.k is 86,528 (7,648 scaled), or 5,120,000 (452,548 scaled). And what
# a result may be off by: a logit of float32 is off by some units of its size, a weight as much.
SIZES = {26.0: 1e-2, 200.0: 0.3}
KEYS = 38


def wide(x: Any) -> Any:
    """Float16 as float64, in values of ops too."""
    if isinstance(x, Tensor):
        return x.double() if x.dtype == torch.float16 else x
    return type(x)(*map(wide, x)) if isinstance(x, Pages | Ring | Heads) else x


def check(off: float, op: str, *args: Any, **options: Any) -> None:
    """Both backends against the reference in float64."""
    found = both(op, *args, **options)
    host = [x.host if isinstance(x, Pair) else x for x in args]
    exact = getattr(load("reference"), op)(*map(wide, host), **options)
    assert exact.isfinite().all() and exact.abs().max() > 0
    for got in (found.host, found.device.cpu()):
        torch.testing.assert_close(got.double(), exact.double(), rtol=off, atol=off)


@pytest.fixture(params=SIZES, ids=str)
def large(request: pytest.FixtureRequest) -> float:
    return request.param


def near(large: float, *shape: int, seed: int) -> Tensor:
    """Keys or queries a little off `large`, so that logits differ by a few units at most."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    off = torch.zeros(*shape)
    off[..., 0] = noise[..., 0] * 8 / large
    return (large + off).half()


def stored(large: float) -> Mirror:
    size = Size(dim=DIM, page=16, dtype=torch.float16, group=2)
    kept = [
        (near(large, KEYS, DIM, seed=h), torch.randn(KEYS, DIM).half(), torch.arange(KEYS))
        for h in range(2)
    ]
    return make_mirror(size, [kept])


def test_attention_of_a_decoded_token(large: float) -> None:
    mirror = stored(large)
    k, v = near(large, 1, 2, WINDOW, DIM, seed=5), torch.randn(1, 2, WINDOW, DIM).half()
    ring = Ring(k, v, torch.zeros(1, 2, WINDOW, dtype=torch.uint8))
    query = near(large, 1, 4, DIM, seed=6)
    lengths, active = torch.tensor([KEYS + WINDOW - 1]), torch.tensor([True])
    picked = torch.tensor([0, 2]).int().expand(1, 2, 2).contiguous()
    for selected in (None, picked):
        check(
            SIZES[large], "paged_decode", query, mirror.pages, mirror.heads, ring, lengths, active,
            WINDOW, SCALE, selected=selected,
        )  # fmt: skip


@pytest.mark.parametrize("op", ["prefill_attention", "dense_prefill"])
def test_attention_of_a_prompt(op: str, large: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:
        monkeypatch.setattr(sparse, "choose_tile", lambda *_: sparse.Tile(32, 16, 4, 2))
    mirror, queries = stored(large), 9
    recent = WINDOW + queries
    segments = segments_of([KEYS + WINDOW - queries], [queries], [recent])
    key, value = near(large, 2, recent, DIM, seed=5), torch.randn(2, recent, DIM).half()
    query = near(large, 4, queries, DIM, seed=6)
    # The recent keys begin where the stored ones of a causal prompt end.
    first = KEYS + WINDOW - recent
    for head in range(2):
        page = mirror.table[0, head, torch.arange(first, KEYS) // 16].long()
        slot = torch.arange(first, KEYS) % 16
        key[head, : KEYS - first] = mirror.pages.host.k[page, slot]
        value[head, : KEYS - first] = mirror.pages.host.v[page, slot]
    if op == "dense_prefill":
        check(SIZES[large], op, query, key, value, segments, mirror.pages, mirror.table, SCALE)
        return
    flags = torch.ones(2, recent, dtype=torch.uint8)
    given = (query, key, value, flags, segments, mirror.pages, mirror.heads, WINDOW, SCALE)
    check(SIZES[large], op, *given)


OPTIONS = [("mean", "visible"), ("max", "global")]


@pytest.mark.parametrize(("group", "normalize"), OPTIONS)
def test_scores_of_the_last_queries(group: str, normalize: str, large: float) -> None:
    mirror = stored(large)
    keys = near(large, 1, 2, WINDOW, DIM, seed=5)
    ring = Ring(keys, keys, torch.zeros(1, 2, WINDOW, dtype=torch.uint8))
    options = dict(observation=4, kernel=3, pooling="avg", group=group, normalize=normalize)
    check(
        SIZES[large] / 9, "window_scores", mirror.pages, mirror.heads, ring,
        near(large, 1, 4, 4, DIM, seed=6), torch.tensor([KEYS + WINDOW]), WINDOW, SCALE, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("group", "normalize"), OPTIONS)
def test_scores_of_a_view(group: str, normalize: str, large: float) -> None:
    valid = torch.ones(1, 2, KEYS, dtype=torch.bool)
    view = EvictionView(
        0, near(large, 1, 2, KEYS, DIM, seed=1), torch.zeros(()),
        torch.arange(KEYS).expand(1, 2, -1), valid, valid,
        near(large, 1, 2, WINDOW, DIM, seed=5), valid[0, :1, :WINDOW],
        torch.tensor([KEYS + WINDOW]), SCALE, near(large, 1, 4, 4, DIM, seed=6), valid[0, :1, :4],
    )  # fmt: skip
    policy = SnapKV(budget=9, observation=4, kernel=3, group=group, normalize=normalize)
    exact = policy.score(
        view._replace(
            keys=view.keys.double(), recent_keys=view.recent_keys.double(),
            queries=view.queries.double(),
        )
    )  # fmt: skip
    off = SIZES[large] / 9
    torch.testing.assert_close(policy.score(view).double(), exact, rtol=off, atol=off)


def test_pages_by_the_bound_of_their_keys(large: float) -> None:
    mirror = stored(large)
    mirror.pages.host.summary.copy_(mirror.pages.host.summary.nan_to_num())
    query = near(large, 1, 4, DIM, seed=6)
    found = both("quest_select", mirror.pages, mirror.heads, query, 2, "mean", 0, 0)
    exact = load("reference").quest_select(
        wide(mirror.pages.host), mirror.heads, query.double(), 2, "mean", 0, 0
    )
    assert torch.equal(found.host, exact) and torch.equal(found.device.cpu(), exact)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_prompt_its_eviction_and_a_token(backend: str) -> None:
    """Equal keys and values: any weights give the value, and infinite logits NaN."""
    kept = []
    for dtype in (torch.float32, torch.float16):
        k = torch.full((1, 9, DIM), 26.0, dtype=dtype, device=DEVICE)
        pipeline = CachePipeline(window=WINDOW, eviction=SnapKV(budget=6), backend=backend)
        spec = CacheSpec(layers=1, heads=1, kv_heads=1, head_dim=DIM, dtype=dtype, device=DEVICE)
        state = pipeline.init(spec)
        pipeline.begin(state, [8], "prompt")
        assert ((pipeline.attend(state, 0, *[k[:, :8]] * 3) - 26).abs() < 1e-4).all()
        pipeline.commit(state)
        pipeline.end_prompt(state)
        kept.append(state.kept(0, 0, 0).tolist())
        pipeline.begin(state, [1], "decode")
        assert ((pipeline.attend(state, 0, *[k[None, :, 8:]] * 3) - 26).abs() < 1e-4).all()
        pipeline.commit(state)
    assert kept[0] == kept[1] and len(kept[0]) == 6
