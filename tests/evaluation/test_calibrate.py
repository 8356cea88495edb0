"""Calibration finds the knob that gives a size, on sizes that can be computed by hand."""

from __future__ import annotations

import pytest
import torch

from tests.support.evaluation.small import small_gate

pytest.importorskip("transformers")

from kvpolicy import (  # noqa: E402
    Adaptive,
    CachePipeline,
    DuoAttention,
    LocalAttention,
    RandomGate,
    Ratio,
    SnapKV,
    Tokens,
    TotalCap,
)
from kvpolicy.evaluation.models import tiny_llama  # noqa: E402
from kvpolicy.evaluation.search.calibrate import calibrate, measure  # noqa: E402

TOKENS, WINDOW = 200, 16


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 512, (n,), generator=generator) for n in (TOKENS, TOKENS - 40)]


@pytest.fixture(scope="module")
def gate():
    return small_gate(WINDOW)


def test_a_gate_s_threshold(model, texts, gate):
    found = calibrate(model, CachePipeline(admission=gate), texts, target="40%")
    assert found.reached and found.knob == "threshold" and found.unit == "fraction"
    assert found.best.size.fraction == pytest.approx(0.4, rel=0.02)
    assert found.pipeline.admission.threshold == found.best.value
    assert found.trials[0].size.fraction < 0.4 < found.trials[1].size.fraction == 1
    assert measure(model, found.pipeline, texts) == found.best.size


def test_a_random_gate_s_sparsity(model, texts):
    pipeline = CachePipeline(admission=RandomGate(sparsity=0.5), window=WINDOW)
    found = calibrate(model, pipeline, texts, tokens=58)
    mean = TOKENS - 20  # of both texts
    assert found.best.size.tokens == pytest.approx(58, rel=0.02)
    assert 1 - found.best.value == pytest.approx((58 - WINDOW) / (mean - WINDOW), abs=0.06)


def test_duo_attention_s_sparsity_is_a_number_of_heads(model, texts, tmp_path):
    (tmp_path / "full_attention_heads.tsv").write_text("0.9\t0.2\n0.7\t0.4\n")
    (tmp_path / "config.json").write_text('{"sink_size": 4, "recent_size": 16}')
    duo = DuoAttention.from_pretrained(tmp_path, sparsity=0.5)
    pipeline = CachePipeline(admission=duo)
    with pytest.raises(ValueError, match="pattern"):
        calibrate(model, pipeline, texts[:1], target="50%")
    found = calibrate(model, pipeline, texts[:1], target="32.5%", pattern=tmp_path)
    assert found.pipeline.admission.full_heads == ((True, False), (False, False))
    assert found.best.size.tokens == (TOKENS + 3 * 20) / 4
    # No number of heads gives this size; the nearest is said to be not it.
    between = calibrate(model, pipeline, texts[:1], target="40%", pattern=tmp_path, trials=6)
    assert not between.reached and between.best.size == found.best.size


@pytest.mark.parametrize("budget", [Tokens(40), Adaptive(Tokens(40)), Ratio(0.5)])
def test_an_eviction_s_budget(budget, model, texts):
    eviction = SnapKV(budget=budget, observation=8)
    pipeline = CachePipeline(eviction=eviction, window=WINDOW)
    found = calibrate(model, pipeline, texts[:1], tokens=100, tolerance=0.01)
    assert found.reached and found.knob == "budget"
    assert abs(found.best.size.tokens - 100) <= 1
    chosen = found.pipeline.eviction.budget
    assert type(chosen) is type(budget) and chosen.tokens_per_head(TOKENS, 0, 2) in (99, 100, 101)
    assert found.pipeline.eviction.observation == 8


def test_bytes_and_a_total_cap(model):
    text = torch.arange(1500) * 7 % 512
    eviction = SnapKV(budget=TotalCap(100), observation=8)
    pipeline = CachePipeline(eviction=eviction, window=WINDOW)
    full = measure(model, CachePipeline(window=WINDOW), [text]).bytes
    found = calibrate(model, pipeline, [text], bytes=full * 0.7, tolerance=0.1)
    assert found.reached and found.best.size.bytes == pytest.approx(full * 0.7, rel=0.1)
    assert 100 < found.pipeline.eviction.budget.tokens < 4 * 1500


def test_what_cannot_be_is_refused(model, texts, gate):
    pipeline = CachePipeline(admission=gate)
    with pytest.raises(ValueError, match="exactly one"):
        calibrate(model, pipeline, texts, target="40%", tokens=3)
    with pytest.raises(ValueError, match='such as "25%"'):
        calibrate(model, pipeline, texts, target="0.25")
    with pytest.raises(ValueError, match="tokens: wanted 5; threshold from 1 to 0 gives 16 to 180"):
        calibrate(model, pipeline, texts, tokens=5)
    with pytest.raises(ValueError, match="got LocalAttention, KeepAll"):
        calibrate(model, CachePipeline(admission=LocalAttention()), texts, tokens=50)
    both = CachePipeline(admission=gate, eviction=SnapKV(budget=Tokens(40)))
    with pytest.raises(ValueError, match="slot"):
        calibrate(model, both, texts, tokens=50)
    assert calibrate(model, both, texts, tokens=30, slot="eviction").knob == "budget"
