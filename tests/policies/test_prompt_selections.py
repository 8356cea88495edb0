"""What selections of prompts choose: as their originals, and as their formulas written out."""

from __future__ import annotations

import math

import attrs
import pytest
import torch

from kvpolicy import (
    CachePipeline,
    FlexPrefill,
    PerPhase,
    PromptView,
    Quest,
    SelectAll,
    VerticalSlash,
    XAttention,
    per_layer,
)
from kvpolicy.ops import Heads, Segments, load
from kvpolicy.selection import PromptCall
from tests.support.kernels.pool import make_pool

# Blocks that tiles read, a bit each, by query head: of the originals' own code in float64, for
# `inputs(1, 60)` in chunks of 16 queries (mit-han-lab/x-attention e379887, xattn_estimate) and for
# `inputs(2, 90)`, queries doubled (bytedance/FlexPrefill a24b27b, get_active_blocks).
XATTENTION = {
    (0.7, 2): [
        [1, 3, 7, 15, 27, 57, 121, 175],
        [1, 3, 7, 13, 29, 43, 121, 143],
        [1, 3, 7, 11, 29, 57, 103, 231],
        [1, 3, 7, 13, 29, 43, 79, 245],
    ],
    (0.9, 4): [
        [1, 3, 7, 15, 31, 63, 127, 223],
        [1, 3, 7, 15, 31, 63, 123, 239],
        [1, 3, 7, 15, 31, 59, 127, 175],
        [1, 3, 7, 15, 29, 59, 127, 247],
    ],
}
FLEX = {
    (0.6, 0.0, 16): [
        [1, 3, 5, 9, 17, 33, 97, 163, 293, 553, 1073, 2081],
        [1, 3, 5, 9, 19, 37, 73, 145, 289, 833, 1409, 2305],
        [1, 3, 5, 11, 21, 41, 81, 161, 321, 641, 1793, 2561],
        [1, 3, 5, 11, 21, 41, 81, 161, 321, 897, 1281, 2817],
    ],
    (0.6, 0.35, 16): [
        [1, 3, 7, 15, 31, 57, 109, 227, 293, 553, 1073, 2353],
        [1, 3, 7, 15, 31, 53, 75, 155, 353, 833, 1473, 2321],
        [1, 3, 7, 11, 29, 47, 85, 161, 325, 641, 1793, 2561],
        [1, 3, 7, 15, 31, 59, 81, 241, 355, 897, 1281, 2881],
    ],
    (0.8, 1.0, 8): [
        [1, 3, 7, 15, 31, 63, 111, 247, 397, 667, 1345, 2353],
        [1, 3, 7, 15, 31, 53, 123, 187, 485, 707, 1089, 2193],
        [1, 3, 7, 15, 31, 47, 127, 167, 469, 603, 1601, 2049],
        [1, 3, 7, 15, 31, 63, 127, 221, 419, 899, 1281, 2113],
    ],
}


def inputs(seed, n, heads=4, kv_heads=2, dim=8):
    """Queries and keys, multiples of 1/64 in [-2, 2)."""
    rng = torch.Generator().manual_seed(seed)

    def draw(count):
        return torch.randint(-128, 128, (count, n, dim), generator=rng).double() / 64

    return draw(heads), draw(kv_heads)


def view_of(query, key, present=None, start=0):
    there = torch.ones(key.shape[:2], dtype=torch.bool) if present is None else present
    key = key.masked_fill(~there[..., None], 0)
    scale = key.shape[2] ** -0.5
    return PromptView(0, range(len(key)), query[:, start:], start, key, there, scale)


def numbers(blocks):
    """Each tile's blocks up to its own, a bit each."""
    return [
        [sum(1 << m for m, on in enumerate(row[: n + 1]) if on) for n, row in enumerate(head)]
        for head in blocks.tolist()
    ]


@pytest.mark.parametrize(("threshold", "stride"), XATTENTION)
def test_xattention_is_the_originals(threshold, stride):
    policy = XAttention(threshold=threshold, stride=stride, tile=8)
    assert numbers(policy.prompt(view_of(*inputs(1, 60))).blocks) == XATTENTION[threshold, stride]


@pytest.mark.parametrize(("gamma", "tau", "least"), FLEX)
def test_flex_prefill_is_the_originals(gamma, tau, least):
    query, key = inputs(2, 90)
    policy = FlexPrefill(gamma=gamma, tau=tau, min_budget=least, tile=8)
    assert numbers(policy.prompt(view_of(2 * query, key)).blocks) == FLEX[gamma, tau, least]


@pytest.mark.parametrize(("tokens", "blocks"), [(126, 1), (127, 2), (255, 3), (512, 5)])
def test_flex_prefill_counts_a_token_that_reaches_gamma(tokens, blocks):
    """As `cumsum <= gamma` does in the original's score_cover_topk; its quotient is by 128."""
    policy = FlexPrefill(gamma=tokens / 512)
    assert policy._cover(torch.full((1, 512), 1 / 512), 1, 99).tolist() == [blocks]


def test_flex_prefill_is_dense_for_short_prompts():
    for n, least in ((16, 8), (40, 40)):
        policy = FlexPrefill(gamma=0.3, min_budget=least, tile=8)
        assert policy.prompt(view_of(*inputs(3, n))).blocks.all()
    assert not policy.prompt(view_of(*inputs(3, 48))).blocks.all()


def masses(query, key, present, stride, tile):
    """Antidiagonal masses of one query head by loops: `[tile][block]`."""
    groups = range(-(-len(query) // stride))
    found = []
    for a in groups:
        weights = {}
        for b in range(a + 1):
            pairs = [
                (stride - 1 - x + a * stride, b * stride + x)
                for x in range(stride)
                if b * stride + x < len(key) and present[b * stride + x]
            ]
            if pairs:
                asked = [(i, j) for i, j in pairs if i < len(query)]
                logit = sum(float(query[i] @ key[j]) for i, j in asked) / len(pairs)
                logit *= query.shape[1] ** -0.5
                weights[b] = len(pairs) / stride * math.exp(logit)
        whole = sum(weights.values())
        found.append({b: w / whole for b, w in weights.items()})
    each = tile // stride
    rows = [found[n : n + each] for n in range(0, len(found), each)]
    return [
        [sum(w for r in row for b, w in r.items() if b // each == m) for m in range(n + 1)]
        for n, row in enumerate(rows)
    ]


def heaviest(mass, threshold):
    kept = {0, len(mass) - 1}
    for m in sorted(range(len(mass)), key=lambda m: -mass[m]):
        if sum(mass[x] for x in kept) >= threshold * sum(mass):
            break
        kept.add(m)
    return sum(1 << m for m in kept)


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_xattention_is_its_formula(rate):
    """Also where tokens are absent, and where a whole group or block is."""
    query, key = inputs(4, 51)
    present = torch.rand(2, 51, generator=torch.Generator().manual_seed(1)) < rate
    present[0, 8:16] &= rate == 1
    policy = XAttention(threshold=0.6, stride=4, tile=8)
    found = numbers(policy.prompt(view_of(query, key, present)).blocks)
    for head in range(4):
        mass = masses(query[head], key[head // 2], present[head // 2], 4, 8)
        assert found[head] == [heaviest(row, 0.6) for row in mass]


@pytest.mark.parametrize("start", [0, 8, 24, 29])
def test_a_threshold_of_one_reads_everything_and_ties_go_to_the_lower(start):
    query, key = inputs(5, 60)
    view = view_of(query, key, start=start)
    blocks = XAttention(threshold=1, stride=2, tile=8).prompt(view).blocks
    assert blocks.shape == (4, 8 - start // 8, 8)
    assert all(row[: start // 8 + n + 1].all() for head in blocks for n, row in enumerate(head))
    alike = XAttention(threshold=0.5, stride=2, tile=8).prompt(view_of(0 * query, key)).blocks
    # All blocks weigh alike but the tile's own, which has fewer groups before its queries.
    for n, row in enumerate(alike[0].tolist()):
        others = [m for m in range(1, n) if row[m]]
        assert others == list(range(1, 1 + len(others)))


def test_the_op_chooses_as_prompt_says():
    query, key = inputs(6, 70)
    policy = XAttention(threshold=0.7, stride=4, tile=16)
    ops, numbers_ = load("reference"), [(0, 70), (0, 70), (0,)]
    device = [torch.tensor(x, dtype=torch.int32) for x in numbers_]
    pages = make_pool(4, 4, 8, torch.float64, slab_pages=4).pages
    heads = Heads(torch.zeros(1, 2, 4, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32))
    flags = torch.ones(2, 70, dtype=torch.uint8)
    call = PromptCall(
        0, range(2), query, key, flags, Segments(*numbers_, *device), pages, heads, None, 8**-0.5,
        None,
    )  # fmt: skip
    assert torch.equal(policy.choose(ops, call).blocks, policy.prompt(view_of(query, key)).blocks)


@pytest.mark.parametrize("tile", [4, 8])
def test_vertical_slash_reads_its_columns_and_diagonals(tile):
    query, key = inputs(7, 61)
    present = torch.rand(2, 61, generator=torch.Generator().manual_seed(2)) < 0.8
    options = {"vertical": 6, "slash": 4, "queries": 5, "first": 2, "nearest": 2}
    found = VerticalSlash(**options, tile=tile).prompt(view_of(query, key, present))
    at = torch.arange(61)
    for head in range(4):
        logits = query[head, -5:] @ key[head // 2].T * 8**-0.5
        seen = (at <= at[-5:, None]) & present[head // 2]
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        columns = sorted(range(2, 61), key=lambda j: -float(weights[:, j].sum()))[:4]
        back = {
            s: sum(float(weights[i, 56 + i - s]) for i in range(5) if 56 + i - s >= 0)
            for s in range(61)
        }
        slashes = sorted(range(2, 61), key=lambda s: -back[s])[:2]
        assert sorted(found.columns[head, 0].tolist()) == sorted([0, 1, *columns])
        touched = {
            (i // tile, (i - s) // tile) for s in (0, 1, *slashes) for i in range(64) if i >= s
        }
        tiles = range(found.blocks.shape[1])
        got = {(n, m) for n in tiles for m in range(n + 1) if found.blocks[head, n, m]}
        assert got == {(n, m) for n, m in touched if n in tiles}


def test_what_they_need_of_a_pipeline():
    for policy in (XAttention(), FlexPrefill(), VerticalSlash()):
        assert policy.neutral and policy.tile in (64, 128)
        assert policy.whole_prompt == (not isinstance(policy, XAttention))
        CachePipeline(selection=policy)
    both = PerPhase(prefill=XAttention(tile=32), decode=Quest(budget=300))
    assert (both.tile, both.whole_prompt, both.neutral, both.pages(256, 16)) == (
        32,
        False,
        False,
        3,
    )
    assert PerPhase().neutral and PerPhase().tile is None
    layers = per_layer(both, {0: SelectAll(), 1: PerPhase(prefill=VerticalSlash())})
    assert (layers.tile, layers.whole_prompt, layers.neutral) == (64, True, False)
    assert layers.at(0).tile is None and layers.at(1).tile == 64 and layers.at(2) == both
    with pytest.raises(ValueError, match="of one class"):
        per_layer(both, {0: PerPhase(decode=Mean(budget=300))})


class Mean(Quest):
    """Another class of summaries."""


def test_a_tile_is_a_power_of_two():
    @attrs.frozen(kw_only=True)
    class Odd(XAttention):
        tile: int = 96

    with pytest.raises(ValueError, match="tile: wanted a power of two, got 96"):
        CachePipeline(selection=Odd())
