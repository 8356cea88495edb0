"""What a policy decides does not depend on what lies beside: on the cut, the batch, the padding."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kvpolicy import Adaptive, CachePipeline, CacheSpec, EvictionView, SnapKV, Tokens, WriteGate
from kvpolicy.eviction import Eviction
from kvpolicy.ops import Heads, Pages
from kvpolicy.reference import quest_select, write_gate
from kvpolicy.selection._base import combine_group

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CUTS = [(0, 1), (4, 5), (1, 17), (3, 36), (20, 21), (2, 34)]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gate_weights(heads: int, dim: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(dim,), (dim,), (heads, hidden, 2 * dim), (heads, hidden), (heads, hidden), (heads,)]
    parts = [randn(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]
    return [*parts[:2], parts[2] / (2 * dim) ** 0.5, parts[3], parts[4] / hidden**0.5, parts[5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "dim", "hidden"),
    [(2, 8, 3), (1, 16, 5), (5, 7, 11), (1, 20, 33), (4, 64, 33), (3, 64, 256)],
)
def test_a_gate_scores_a_token_the_same_under_any_cut(
    heads: int, dim: int, hidden: int, dtype: torch.dtype
) -> None:
    parts = gate_weights(heads, dim, hidden, dtype)
    pre, key = (randn(heads, 37, dim, seed=s, dtype=dtype) for s in (8, 9))
    whole = write_gate(pre, key, *parts)
    for a, b in CUTS:
        assert torch.equal(write_gate(pre[:, a:b], key[:, a:b], *parts), whole[:, a:b])
    across = key.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(write_gate(pre, across, *parts), whole)


def test_the_admitted_are_the_same_under_any_cut() -> None:
    """The threshold is a token's own score, so that one unit of rounding would decide."""
    dim, tokens = 8, 17
    parts = gate_weights(2, dim, 3, torch.float32)
    names = ("norm_pre", "norm_post", "w1", "b1", "w2", "b2")
    pre, key = (randn(2, tokens, dim, seed=s) for s in (8, 9))
    whole = write_gate(pre, key, *parts)[0]
    alone = torch.stack([write_gate(pre[:, t, None], key[:, t, None], *parts)[0, 0]
                         for t in range(tokens)])  # fmt: skip

    def kept(threshold: float, cuts: list[int]) -> list[list[int]]:
        weights = {name: part[None] for name, part in zip(names, parts, strict=True)}
        gate = WriteGate(**weights, threshold=threshold, window=2)
        pipeline = CachePipeline(admission=gate, backend="reference")
        state = pipeline.init(CacheSpec(layers=1, heads=2, kv_heads=2, head_dim=dim))
        for i, j in itertools.pairwise(cuts):
            pipeline.begin(state, [j - i], "prompt")
            part = key[:, i:j]
            pipeline.attend(state, 0, part, part, part, key_pre=pre[:, i:j])
            pipeline.commit(state)
        return [state.kept(0, 0, head).tolist() for head in range(2)]

    for threshold in whole.minimum(alone).tolist():
        assert kept(threshold, list(range(tokens + 1))) == kept(threshold, [0, tokens])


MODES = list(itertools.product(["mean", "max"], ["visible", "global"], ["avg", "max"]))


@pytest.mark.parametrize(("group", "normalize", "pooling"), MODES)
def test_snapkv_keeps_the_same_in_any_batch(group: str, normalize: str, pooling: str) -> None:
    """Few tokens a head and a wide kernel: scores tie, so that rounding would decide."""
    heads, kv_heads, window = 8, 4, 8

    def prompt(tokens: int, seed: int) -> list[Tensor]:
        return [
            randn(h, tokens, 8, seed=seed + n) for n, h in enumerate((heads, kv_heads, kv_heads))
        ]

    def kept(policy: Eviction, prompts: list[list[Tensor]]) -> list[list[list[int]]]:
        pipeline = CachePipeline(eviction=policy, window=window, backend="reference")
        spec = CacheSpec(layers=1, heads=heads, kv_heads=kv_heads, head_dim=8, page_size=4)
        state = pipeline.init(spec, len(prompts))
        pipeline.begin(state, [x[0].shape[1] for x in prompts], "prompt")
        packed = (torch.cat([x[i] for x in prompts], 1) for i in range(3))
        pipeline.attend(state, 0, *packed)
        pipeline.commit(state)
        pipeline.end_prompt(state)
        rows, columns = range(len(prompts)), range(kv_heads)
        return [[state.kept(0, row, head).tolist() for head in columns] for row in rows]

    options = {"group": group, "normalize": normalize, "pooling": pooling}
    for seed, (short, budget, kernel) in enumerate([(11, 10, 5), (13, 11, 11), (30, 20, 5)]):
        policy = SnapKV(budget=Adaptive(Tokens(budget), 0.2), kernel=kernel, **options)
        a, b, c = prompt(short, 10 * seed), prompt(40, 10 * seed + 3), prompt(57, 10 * seed + 6)
        alone = kept(policy, [a])
        assert kept(policy, [a, b])[:1] == kept(policy, [c, a, b])[1:2] == alone


@pytest.mark.parametrize(("group", "normalize", "pooling"), MODES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_snapkv_scores_a_view_the_same_in_any_batch(
    group: str, normalize: str, pooling: str, dtype: torch.dtype
) -> None:
    lengths, window, width, dim = [6, 61, 100], 5, 95, 16
    held = torch.tensor([max(n - window, 0) for n in lengths])
    valid = (torch.arange(width) < held[:, None])[:, None].expand(-1, 2, -1).contiguous()
    valid[2, 1, 40:] = False
    view = EvictionView(
        0, randn(3, 2, width, dim, seed=1, dtype=dtype), torch.zeros(()),
        torch.arange(width).expand(3, 2, -1), valid, valid,
        randn(3, 2, window, dim, seed=2, dtype=dtype), torch.ones(3, window, dtype=torch.bool),
        torch.tensor(lengths), 0.3, randn(3, 6, 7, dim, seed=3, dtype=dtype),
        torch.arange(-7, 0) + torch.tensor(lengths)[:, None] >= 0,
    )  # fmt: skip
    policy = SnapKV(
        budget=9, observation=7, kernel=3, group=group, normalize=normalize, pooling=pooling
    )
    whole = policy.score(view)
    for row, used in enumerate(held.tolist()):
        own, part = slice(row, row + 1), slice(used)
        alone = policy.score(
            view._replace(
                keys=view.keys[own, :, part], positions=view.positions[own, :, part],
                valid=valid[own, :, part], marked=valid[own, :, part],
                recent_keys=view.recent_keys[own], recent_valid=view.recent_valid[own],
                lengths=view.lengths[own], queries=view.queries[own],
                query_valid=view.query_valid[own],
            )
        )  # fmt: skip
        assert torch.equal(alone[valid[own, :, part]], whole[own, :, part][valid[own, :, part]])


@pytest.mark.parametrize("group", ["max", "mean", "each"])
def test_a_page_scores_the_same_beside_any_others(group: str) -> None:
    scores = randn(2, 3, 8, 101, seed=1)
    whole = combine_group(scores, group)
    for width in range(1, 101, 9):
        part = scores[:1, ..., :width].contiguous()
        assert torch.equal(combine_group(part, group), whole[:1, :, :width])


@pytest.mark.parametrize("seed", range(5))
def test_quest_selects_the_same_in_any_batch(seed: int) -> None:
    """Most pages are equal, and rounding would decide between them."""
    dim, group, pages, budget = 8, 8, 130, 5
    number = torch.zeros(0, dtype=torch.int32)
    summary = torch.zeros(pages + 1, 2 * dim)
    summary[1:] = randn(3, 2 * dim, seed=seed).repeat(pages // 3 + 1, 1)[:pages]
    blank = torch.zeros(pages + 1, 1, dim)
    stored = Pages(blank, blank, number, summary, number, 1, number, number, number)
    query = randn(2, group, dim, seed=seed + 9)
    table = torch.arange(1, pages + 1, dtype=torch.int32).expand(2, 1, -1).contiguous()
    counts = torch.tensor([[37], [pages]], dtype=torch.int32)
    both = quest_select(stored, Heads(table, counts), query, budget, "mean", 0, 0)
    for row in range(2):
        own = slice(row, row + 1)
        heads = Heads(table[own], counts[own])
        assert torch.equal(quest_select(stored, heads, query[own], budget, "mean", 0, 0), both[own])
