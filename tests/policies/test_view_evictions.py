"""Evictions that ask for more than stored tokens, against their originals' own code.

The kept sets were recorded from NVIDIA/kvpress's presses, Zefan-Cai/R-KV's R1KV and
WeianMao/triattention's pruning_utils, run on the same sines in float64; where a press may drop the
last token, it was forced in.
"""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import (
    H2O,
    RKV,
    Adaptive,
    CachePipeline,
    CapKV,
    CriticalKV,
    EvictionView,
    ExpectedAttention,
    Rope,
    SnapKV,
    Tokens,
    TotalCap,
    TriAttention,
)
from kvpolicy._files import write_pt
from kvpolicy.eviction.r_kv import _shared
from kvpolicy.eviction.triattention import PARTS
from kvpolicy.testing import check_eviction
from tests.support.sines import DIM, HEADS, KEY, QUERY, ROPE, T, kept

EXPECTED = [
    [0, 1, 2, 3, 4, 5, 7, 10, 12, 16, 21, 23, 25, 35, 43, 47],
    [0, 1, 2, 3, 11, 14, 18, 26, 32, 35, 36, 39, 42, 45, 46, 47],
]
WITHOUT_COVARIANCE = [
    [0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 21, 23, 25, 35, 43, 47],
    [0, 1, 2, 3, 11, 14, 18, 26, 32, 35, 36, 39, 42, 45, 46, 47],
]
WITHOUT_VALUES = [
    [0, 1, 2, 3, 5, 11, 12, 22, 25, 26, 31, 34, 36, 42, 45, 47],
    [0, 1, 2, 3, 7, 8, 11, 15, 16, 21, 26, 30, 31, 39, 40, 47],
]
OTHER_OPTIONS = [
    [0, 1, 5, 7, 11, 15, 16, 25, 30, 34, 35, 36, 40, 41, 45, 47],
    [0, 1, 2, 6, 15, 16, 20, 21, 26, 30, 31, 39, 40, 44, 45, 47],
]
CRITICAL = [
    [0, 1, 2, 3, 4, 5, 7, 10, 21, 25, 27, 34, 35, 38, 43, 47],
    [0, 1, 2, 3, 11, 14, 15, 18, 21, 29, 35, 36, 40, 42, 46, 47],
]
CRITICAL_MORE = [
    [0, 1, 2, 3, 5, 7, 11, 21, 25, 26, 34, 35, 36, 42, 43, 47],
    [0, 1, 2, 3, 7, 14, 15, 21, 26, 30, 35, 36, 39, 40, 42, 47],
]
CRITICAL_SNAP = [
    [0, 1, 5, 6, 7, 10, 11, 12, 30, 31, 42, 43, 44, 45, 46, 47],
    [6, 7, 8, 10, 24, 25, 26, 29, 30, 31, 42, 43, 44, 45, 46, 47],
]
SNAP = [
    [0, 1, 5, 6, 10, 11, 12, 29, 30, 31, 42, 43, 44, 45, 46, 47],
    [6, 7, 8, 9, 10, 24, 25, 26, 30, 31, 42, 43, 44, 45, 46, 47],
]
R_KV = [
    [0, 1, 2, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14, 26, 29, 32, *range(40, 48)],
    [4, 5, 6, 7, 8, 9, 10, 23, 26, 27, 28, 29, 30, 31, 32, 33, *range(40, 48)],
]
R_KV_OTHER = [
    [1, 2, 3, 10, 11, 12, 15, 16, 17, 25, 26, 27, 29, 30, 31, 32, 33, 39, 40, 41, *range(44, 48)],
    [4, 6, 8, 9, 10, 11, 15, 16, 17, 24, 25, 26, 27, 29, 30, 31, 32, 38, 39, 40, *range(44, 48)],
]
# kvpress's CapPress but that the newest token stays, with its defaults and with other options.
CAP = [
    [0, 1, 2, 3, 5, 7, 10, 15, 19, 26, 33, 36, 39, 42, 45, 47],
    [0, 1, 2, 3, 9, 13, 14, 17, 23, 26, 28, 38, 40, 42, 43, 47],
]
CAP_OTHER = [
    [0, 1, 7, 9, 17, 18, 21, 22, 34, 35, 36, 38, 39, 40, 45, 47],
    [0, 1, 2, 5, 8, 13, 15, 26, 35, 38, 39, 41, 42, 43, 46, 47],
]
TRI = [
    [0, 1, 2, 6, 11, 16, 20, 25, 26, 30, 31, 35, 39, 40, 45, 47],
    [1, 6, 10, 11, 15, 16, 21, 25, 26, 30, 31, 39, 40, 44, 45, 47],
]
HELD = 16


def critical(first, inner=None):
    inner = inner or ExpectedAttention(budget=HELD, value_norm=False)
    return CriticalKV(inner, first=first)


def tri(**options):
    """Statistics of the sines themselves."""
    q = torch.complex(QUERY[..., : DIM // 2], QUERY[..., DIM // 2 :])
    mean = q.mean(1)[None]
    parts = {"real": mean.real, "imaginary": mean.imag, "size": q.abs().mean(1)[None]}
    return TriAttention(**{"budget": HELD, "when": "prompt_end"} | parts | options)


@pytest.mark.parametrize("cuts", [1, 5])
@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (ExpectedAttention(budget=HELD), EXPECTED),
        (ExpectedAttention(budget=HELD, covariance=False), WITHOUT_COVARIANCE),
        (ExpectedAttention(budget=HELD, value_norm=False), WITHOUT_VALUES),
        (ExpectedAttention(budget=HELD, epsilon=0.02, sinks=2, future=7), OTHER_OPTIONS),
        (critical(0.5), CRITICAL),
        (critical(0.75), CRITICAL_MORE),
        (critical(0.75, SnapKV(budget=HELD, observation=6, kernel=3)), CRITICAL_SNAP),
        (critical(1.0, SnapKV(budget=HELD, observation=6, kernel=3)), SNAP),
        (CapKV(budget=HELD), CAP),
        (CapKV(budget=HELD, tau=1.0, sinks=2, future=7, epsilon=0.1), CAP_OTHER),
        (RKV(budget=24, when="prompt_end"), R_KV),
        (RKV(budget=24, when="prompt_end", observation=4, mix=0.5, kernel=3), R_KV_OTHER),
    ],
    ids=repr,
)
def test_the_prompt_is_kept_as_the_original_does(policy, wanted, cuts):
    assert kept(policy, cuts=cuts) == wanted


def test_triattention():
    assert kept(tri(), window=1) == TRI
    assert kept(tri(keep_prompt=True, budget=20, when="decode"), window=1, prompt=30) != TRI


# Of its scores: query head, offsets up to, RoPE's factor, and the first six tokens of its KV head.
SERIES = [
    (0, 64, 1.25, [20.492854, 19.434412, 19.211725, 12.189373, 11.532676, 17.325519]),
    (3, 1, 1.0, [6.252658, 18.372587, 15.068369, 10.709513, 10.205088, 13.692655]),
]


@pytest.mark.parametrize(("head", "farthest", "factor", "wanted"), SERIES)
def test_the_series_is_the_originals(head, farthest, factor, wanted):
    """The original turns keys back first and multiplies by the factor twice."""
    kv = head // 2
    policy = tri(farthest=farthest, normalize=False)
    one = {
        name: getattr(policy, name)[:, head : head + 1] for name in ("real", "imaginary", "size")
    }
    view = EvictionView(
        0, KEY[None, kv : kv + 1], KEY, torch.arange(T)[None, None], torch.ones(1, 1, T).bool(),
        torch.ones(1, 1, T).bool(), KEY, KEY, torch.tensor([T]), DIM**-0.5,
        rope=attrs.evolve(ROPE, factor=factor),
    )  # fmt: skip
    found = attrs.evolve(policy, **one).score(view)[0, 0]
    assert found[:6].tolist() == pytest.approx(wanted, abs=1e-5)


def test_triattention_reads_the_authors_files(tmp_path):
    policy = tri()
    heads = {
        f"layer00_head{h:02d}": {
            name: getattr(policy, field)[0, h]
            for name, field in zip(PARTS, ("real", "imaginary", "size"), strict=True)
        }
        for h in range(HEADS)
    }
    write_pt(tmp_path / "stats.pt", {"metadata": {"head_dim": DIM}, "stats": heads})
    read = TriAttention.from_pretrained(tmp_path / "stats.pt", budget=HELD, when="prompt_end")
    assert kept(read, window=1) == TRI
    read.save(tmp_path / "stats.safetensors")
    again = TriAttention.from_pretrained(tmp_path, "stats.safetensors", budget=HELD)
    assert all(torch.equal(getattr(again, x), getattr(read, x)) for x in ("real", "size"))
    del heads["layer00_head01"]
    write_pt(tmp_path / "less.pt", {"stats": heads})
    with pytest.raises(ValueError, match=r"less\.pt: wanted q_mean_real, .*layer00_head01"):
        TriAttention.from_pretrained(tmp_path / "less.pt", budget=HELD)
    with pytest.raises(ValueError, match=r"real: wanted \[L, Hq, D / 2\]"):
        kept(attrs.evolve(tri(), real=torch.ones(2, 4, 4), imaginary=torch.ones(2, 4, 4),
                          size=torch.ones(2, 4, 4)))  # fmt: skip


def test_the_prompt_stays_where_it_is_asked_for():
    held = kept(tri(keep_prompt=True, budget=34, when="decode"), prompt=30, window=2, interval=4)
    assert all(set(range(30)) <= set(positions) for positions in held)
    assert all(len(positions) < T for positions in held)


def test_without_rope_nothing_turns():
    plain = kept(ExpectedAttention(budget=HELD), rope=None)
    assert plain != EXPECTED
    still = Rope(frequencies=(0.0,) * (DIM // 2))
    assert kept(ExpectedAttention(budget=HELD), rope=still) == plain


def test_capkv_reads_values_in_parts_of_any_size(monkeypatch):
    """Parts end inside of pages too."""
    for size in (1, 3, 7, 1000):
        monkeypatch.setattr("kvpolicy.eviction.cap_kv._EVEN", size)
        assert kept(CapKV(budget=HELD)) == CAP


def test_capkv_of_sinks_alone_drops_nothing_else():
    """All that is stored before the window is a sink: nothing has a weight."""
    assert kept(CapKV(budget=HELD, sinks=T), window=1)[0] == [*range(32, 47), 47]


def test_criticalkv_wants_a_budget_of_each_layer():
    with pytest.raises(ValueError, match="^eviction: wanted one whose budget says"):
        CriticalKV(SnapKV(budget=TotalCap(40)))


def test_criticalkv_is_its_inner_eviction_but_for_values():
    """With values whose projections are all alike, only the tokens' order counts."""
    inner = SnapKV(budget=HELD, observation=6, kernel=3)
    assert kept(CriticalKV(inner, first=1.0)) == kept(inner)
    assert kept(CriticalKV(inner, first=0.0)) != kept(inner)


@pytest.mark.parametrize(
    "policy",
    [
        ExpectedAttention(budget=24),
        ExpectedAttention(budget=Adaptive(Tokens(24)), when="decode", covariance=False),
        CriticalKV(ExpectedAttention(budget=24, value_norm=False)),
        CriticalKV(H2O(budget=24)),
        CapKV(budget=24),
        CapKV(budget=Adaptive(Tokens(24)), when="decode"),
        RKV(budget=24),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_they_conform(policy, dtype):
    check_eviction(policy, dtype=dtype)


@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["alike", "apart"])
def test_redundancy_is_the_mean_of_what_is_left_of_all_cosines(spread):
    """Keys that nothing resembles take their cosine with the first from it, as the original's."""
    rng = torch.Generator().manual_seed(3)
    keys = torch.randn(1, 1, 30, 24, generator=rng) * spread + torch.ones(24) * (spread < 1)
    near = torch.randn(1, 1, 4, 24, generator=rng)
    every = torch.ones(1, 1, 30).bool()
    view = EvictionView(
        0, keys, keys, torch.arange(30)[None, None], every, every, near, torch.ones(1, 4).bool(),
        torch.tensor([34]), 1.0,
    )  # fmt: skip
    policy = RKV(budget=9)
    n, unit = 34, torch.nn.functional.normalize(torch.cat([keys, near], 2)[0, 0].double(), dim=-1)
    left = torch.zeros(n)
    for i in range(n):
        cosines = [float(unit[i] @ unit[j]) * (i != j) for j in range(n)]
        last = max((j for j in range(n) if cosines[j] > 0.5), default=0)
        left += torch.tensor([c * (j != last) for j, c in enumerate(cosines)])
    wanted = (left / n).softmax(0)[:30]
    found = _shared(policy._means(view, 0, keys[0]), view, 0, every[0])[0]
    assert torch.allclose(found, wanted.to(found), atol=1e-6)


def test_r_kv_holds_no_product_of_all_keys():
    """A thousand times more tokens than a block: a product of all with all has 10^10 numbers."""
    from kvpolicy.reference import redundancy

    keys = torch.nn.functional.normalize(torch.randn(1, 100_000, 2), dim=-1)
    found = redundancy.last_similar(keys, torch.tensor([100_000]), 0.5)
    assert (found[0, :-1] >= 99_000).all()


def test_no_statistics_without_asking():
    pipeline = CachePipeline(eviction=SnapKV(budget=64))
    assert not pipeline.reads
