"""Kept sets and counts of the methods' own code: recorded numbers, from formulas computed apart.

Queries and keys are sines, so that a case is a few numbers. SnapKV: FasterDecoding/SnapKV per query
head, combined as NVIDIA/kvpress (mean) and EMCLab-Sinica/WG-KV (max) do. AdaKV: kvpress counts its
floor with the window, FFY0/AdaKV blends. PyramidKV: Zefan-Cai/KVCache-Factory. DuoAttention and
StreamingLLM: mit-han-lab.
"""

from __future__ import annotations

import pytest
import torch

from kvpolicy import (
    Adaptive,
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    DuoAttention,
    LocalAttention,
    Pyramid,
    Ratio,
    SnapKV,
    Tokens,
    all_of,
)

T, SEEN, HELD = 48, 4, 16  # tokens, observing ones, budget


def waves(phase, heads):
    h, t, d = (torch.arange(n, dtype=torch.float64) for n in (heads, T, 8))
    h, t, d = h[:, None, None], t[None, :, None], d[None, None]
    return 2 * torch.sin(phase + 1.7 * h + 0.9 * t * (d + 1) + 0.31 * t * t)


def kept(eviction):
    """Positions before the window that two heads keep of the sines, and the pipeline's window."""
    query, key = waves(0.3, 4), waves(1.1, 2)
    # The first head looks at the window most of all, so that little is left to share.
    key[0, -SEEN:] = 0.5 * (query[0, -SEEN:] + query[1, -SEEN:]) + 0.4 * query[0, -SEEN:]
    key[0, :-SEEN] *= 0.35
    pipeline = CachePipeline(eviction=eviction, backend="reference")
    spec = CacheSpec(layers=1, heads=4, kv_heads=2, head_dim=8, page_size=4, dtype=torch.float64)
    state = pipeline.init(spec)
    pipeline.begin(state, [T], "prompt")
    pipeline.attend(state, 0, query, key, key)
    pipeline.commit(state)
    pipeline.end_prompt(state)
    found = [state.kept(0, 0, head).tolist() for head in range(2)]
    assert all(head[-SEEN:] == list(range(T - SEEN, T)) for head in found)
    assert pipeline.window == SEEN  # without an admission it is the observation
    return [head[:-SEEN] for head in found]


SHARP = [3, 4, 7, 8, 9, 10, 11, 23, 24, 25, 31, 32]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [[3, 4, 7, 10, 11, 17, 18, 24, 25, 26, 31, 32], SHARP]),
        ({"group": "max"}, [[3, 4, 5, 7, 10, 11, 17, 18, 24, 25, 26, 27], SHARP]),
        (
            {"kernel": 3, "pooling": "max"},
            [
                [4, 5, 6, 15, 16, 17, 25, 26, 27, 31, 32, 33],
                [8, 9, 10, 11, 22, 23, 24, 25, 26, 31, 32, 33],
            ],
        ),
        (
            {"kernel": 1},
            [
                [5, 9, 11, 12, 16, 18, 24, 26, 31, 32, 37, 39],
                [3, 4, 5, 9, 10, 12, 16, 19, 23, 25, 30, 32],
            ],
        ),
    ],
    ids=str,
)
def test_snapkv(options, wanted):
    assert kept(SnapKV(budget=HELD, observation=SEEN, **options)) == wanted


MOST = [2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 17, 18, 21, 22, 23, 24, 25, 26, 30, 31, 32, 33]


@pytest.mark.parametrize(
    ("form", "floor", "wanted"),
    [
        ("minimum", 0.2, [[11, 24], MOST]),
        ("window", 0.2, [[], sorted([*MOST, 6, 27])]),
        ("blend", 0.2, [[11, 24], [n for n in MOST if n != 22]]),
        (
            "minimum",
            0.5,
            [[10, 11, 17, 18, 24, 25], [n for n in MOST if n not in (18, 21, 22, 33)]],
        ),
        ("window", 0.5, [[10, 11, 24, 25], [n for n in MOST if n not in (21, 22)]]),
        ("blend", 0.5, [[10, 11, 17, 18, 24, 25], [n for n in MOST if n not in (18, 21, 22, 33)]]),
        ("blend", 0.9, [[3, 4, 10, 11, 17, 18, 24, 25, 26, 32], SHARP]),
    ],
)
def test_adakv_and_its_floors(form, floor, wanted):
    budget = Adaptive(Tokens(HELD), floor=floor, form=form)
    assert kept(SnapKV(budget=budget, observation=SEEN)) == wanted


@pytest.mark.parametrize(
    ("tokens", "seen", "first", "last"),
    [(1024, 8192, 1966, 82), (512, 8192, 968, 56), (2048, 3000, 3000, 1096)],
)
def test_pyramidkv(tokens, seen, first, last):
    """The authors' line over 32 layers, held to its mean."""
    held = [Pyramid(Tokens(tokens)).tokens_per_head(seen, layer, 32) for layer in range(32)]
    assert (held[0], held[-1]) == (first, last)
    assert sum(held) == pytest.approx(32 * tokens, abs=16)


def streamed(eviction, admission=None, prompt=120, decoded=200, turn=0):
    """Tokens that each of two heads holds after a prompt and decoded tokens, and a second turn."""
    parts = {} if admission is None else {"admission": admission}
    pipeline = CachePipeline(eviction=eviction, **parts)
    state = pipeline.init(CacheSpec(layers=1, heads=2, kv_heads=2, head_dim=4, page_size=4))

    def call(tokens, phase):
        pipeline.begin(state, [tokens], phase)
        x = torch.zeros(2, tokens, 4) if phase == "prompt" else torch.zeros(1, 2, 1, 4)
        pipeline.attend(state, 0, x, x, x)
        pipeline.commit(state)

    call(prompt, "prompt")
    pipeline.end_prompt(state)
    for _ in range(decoded):
        call(1, "decode")
    if turn:
        call(turn, "prompt")
    return [len(state.kept(0, 0, head)) for head in range(2)]


DUO = DuoAttention(full_heads=[[True, False]], sinks=16, window=64)
LOCAL = LocalAttention(window=60, sinks=4)


def test_streaming_heads_go_on_as_the_original_s():
    """80 tokens forever: 16 sinks and the last 64."""
    assert streamed(AtPromptEnd(DUO)) == [320, 80]
    assert streamed(AtPromptEnd(DUO), decoded=40) == [160, 80]
    assert streamed(AtPromptEnd(LOCAL)) == [64, 64]


def test_generated_tokens_may_be_kept():
    assert streamed(AtPromptEnd(DUO, generated="keep")) == [320, 216]
    assert streamed(AtPromptEnd(LOCAL, generated="keep"), decoded=50) == [4 + 60, 4 + 60]
    assert streamed(AtPromptEnd(LOCAL, generated="keep"), decoded=70) == [4 + 70, 4 + 70]


def test_beside_an_admission_a_token_stays_if_both_want_it():
    sinks = LocalAttention(window=64, sinks=10)
    both = all_of(DUO, sinks)
    assert streamed(AtPromptEnd(DUO), sinks) == streamed(AtPromptEnd(sinks), DUO)
    assert streamed(AtPromptEnd(DUO), sinks) == streamed(AtPromptEnd(both)) == [74, 74]


def test_a_later_turn_is_dense_until_its_own_end():
    """What the first turn dropped stays dropped; the second one's tokens are all there."""
    assert streamed(AtPromptEnd(LOCAL), decoded=10, turn=100) == [4 + 100, 4 + 100]


@pytest.mark.parametrize("tokens", [256, 257, 400, 513, 514])
def test_a_ratio_works_at_every_length(tokens):
    pipeline = CachePipeline(eviction=SnapKV(budget=Ratio(0.5)), window=256)
    assert sizes(pipeline, tokens) == ([max(tokens // 2, 256)], [tokens < 512])


def test_a_pyramid_works_with_a_wide_window():
    pipeline = CachePipeline(eviction=SnapKV(budget=Pyramid(Tokens(1024))), window=256)
    held, floored = sizes(pipeline, 2000, layers=8)
    assert held[0] > 1024 > held[-1] == 256
    assert floored == [0] * (8 - sum(floored)) + [1] * sum(floored) and sum(floored)
    asked = [Pyramid(Tokens(1024)).tokens_per_head(2000, layer, 8) for layer in range(8)]
    assert held == [max(n, 256) for n in asked]


def sizes(pipeline, tokens, layers=1):
    """Tokens that a head of each layer holds after a prompt, and where the window was the floor."""
    state = pipeline.init(CacheSpec(layers=layers, heads=1, kv_heads=1, head_dim=4))
    generator = torch.Generator().manual_seed(1)
    pipeline.begin(state, [tokens], "prompt")
    for layer in range(layers):
        x = torch.randn(1, tokens, 4, generator=generator)
        pipeline.attend(state, layer, x, x, x)
    pipeline.commit(state)
    assert pipeline.report(state).floored == [0] * layers  # nothing was evicted yet
    pipeline.end_prompt(state)
    report = pipeline.report(state)
    return [heads[0] for heads in report.stored], report.floored
