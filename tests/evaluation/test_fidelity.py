"""A pipeline against full attention: nothing lost by the neutral one, exact numbers for others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from kvpolicy import CachePipeline, LocalAttention, Quest, SnapKV, Tokens  # noqa: E402
from kvpolicy.adapters.hf.models import served  # noqa: E402
from kvpolicy.adapters.hf.rule.tiny import tiny_model  # noqa: E402
from kvpolicy.evaluation.look.fidelity import compare  # noqa: E402
from kvpolicy.evaluation.models import tiny_llama  # noqa: E402

PROMPT, REST = 70, 10


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 512, (PROMPT + REST,), generator=generator)


@pytest.fixture(scope="module")
def weights(model, ids):
    """Full attention of the decoded tokens, float64 `[L, Hq, REST, N]`, by eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids[None], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack(found)[:, 0, :, -REST:].double()


def test_the_neutral_pipeline_loses_nothing(model, ids):
    before = dict(model.config.__dict__)
    found = compare(model, CachePipeline(window=16), ids, continuation=REST, chunk=3)
    assert found.prompt_tokens == PROMPT
    assert len(found.kl) == REST + 1
    assert max(found.kl) < 1e-9
    assert found.agreement == 1 and found.divergence is None
    assert found.lost_mass.shape == (2, 4) and found.lost_mass.max() == 0
    assert not found.without_effect and all(e.neutral for e in found.effects)
    assert model.config.__dict__ == before and "generate" not in model.__dict__


@pytest.mark.parametrize("chunk", [3, 64])
def test_local_attention_loses_what_lies_before_its_window(model, ids, weights, chunk):
    pipeline = CachePipeline(admission=LocalAttention(window=16, sinks=2))
    found = compare(model, pipeline, ids, continuation=REST, chunk=chunk)
    query = torch.arange(PROMPT, PROMPT + REST)[:, None]
    key = torch.arange(PROMPT + REST)
    lost = (weights * ((key >= 2) & (query - key >= 16))).sum(-1).mean(-1)
    assert lost.min() > 0.05
    torch.testing.assert_close(found.lost_mass, lost, atol=1e-6, rtol=1e-5)
    admission, selection, eviction = found.effects
    assert admission.took_effect and not selection.took_effect and not eviction.took_effect
    assert found.mean_kl > 0.01


def test_kl_and_the_first_divergence_are_those_of_a_masked_forward(model, ids):
    pipeline = CachePipeline(admission=LocalAttention(window=16, sinks=2))
    found = compare(model, pipeline, ids, continuation=REST)
    at = torch.arange(PROMPT + REST)
    seen = (at <= at[:, None]) & ((at[:, None] - at < 16) | (at < 2))
    mask = torch.where(seen, 0.0, float("-inf"))[None, None]
    with torch.no_grad():
        full, local = (
            model(ids[None], attention_mask=m).logits[0, -REST - 1 :].double().log_softmax(-1)
            for m in (None, mask)
        )
    kl = (full.exp() * (full - local)).sum(-1)
    assert found.kl == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
    agrees = (full.argmax(-1) == local.argmax(-1)).tolist()
    assert list(found.agrees) == agrees and not all(agrees)
    first = agrees.index(False)
    assert found.divergence.position == PROMPT - 1 + first
    assert found.divergence.full_id == int(full[first].argmax())
    assert found.divergence.pipeline_id == int(local[first].argmax())


@pytest.mark.parametrize("group", ["max", "each"])
def test_a_selection_loses_what_it_does_not_read(model, ids, weights, group):
    quest = Quest(budget=Tokens(32), group=group)
    found = compare(model, CachePipeline(window=16, selection=quest), ids, continuation=REST)
    # One page of 16 besides the window of 16; the trailing page is always that one.
    query = torch.arange(PROMPT, PROMPT + REST)[:, None]
    key = torch.arange(PROMPT + REST)
    page = (query - 16) // 16  # of the newest token that has left the window
    lost = (weights * ((query - key >= 16) & (key // 16 != page))).sum(-1).mean(-1)
    torch.testing.assert_close(found.lost_mass, lost, atol=1e-6, rtol=1e-5)
    assert found.effects[1].took_effect and "tokens read" in found.effects[1].detail


def test_decode_time_evictions_count_what_was_there_when_it_was_read(model, ids, weights):
    snapkv = SnapKV(budget=Tokens(24), observation=8, when="decode")
    found = compare(model, CachePipeline(window=16, eviction=snapkv), ids, continuation=REST)
    assert found.effects[2].took_effect
    assert found.lost_mass.min() > 0
    held = torch.tensor(found.report.stored)
    assert held.max() <= 24 + 16
    assert (found.lost_mass < weights.new_ones(())).all()


def test_a_policy_without_effect_is_named(model, ids):
    snapkv = SnapKV(budget=Tokens(500), observation=8)
    found = compare(model, CachePipeline(window=16, eviction=snapkv), ids, continuation=2)
    assert [e.slot for e in found.without_effect] == ["eviction"]


def test_bad_texts_are_refused(model, ids):
    with pytest.raises(ValueError, match="tokenizer"):
        compare(model, CachePipeline(), "a text")
    with pytest.raises(ValueError, match="more than continuation = 80"):
        compare(model, CachePipeline(), ids, continuation=80)
    with pytest.raises(ValueError, match="token ids"):
        compare(model, CachePipeline(), ids.float())


# Softcap, sinks, chunks, states beside attention, values of another size, shared keys.
@pytest.mark.parametrize(
    "name",
    ["gemma2", "gpt_oss", "llama4_text", "qwen3_5_text", "jamba", "mimo_v2_flash", "gemma3n_text"],
)
def test_models_of_every_kind_lose_what_their_own_attention_says(name):
    model = tiny_model(name).eval()
    ids = torch.randint(20, 60, (32,), generator=torch.Generator().manual_seed(3))
    pipeline = CachePipeline(admission=LocalAttention(window=5, sinks=2))
    found = compare(model, pipeline, ids, continuation=REST)
    with torch.no_grad():
        weights = model(ids[None], output_attentions=True, use_cache=False).attentions
    weights = [x for x in weights if x is not None]
    known = served(model)
    query, key = torch.arange(32 - REST, 32)[:, None], torch.arange(32)
    hidden = (key >= 2) & (query - key >= 5)
    own = [x for x, layer in zip(weights, known.probe.layers, strict=True) if not layer.shared]
    acting = 0
    for index, (layer, each) in enumerate(zip(known.layers, own, strict=True)):
        lost = (each[0, :, -REST:].double() * hidden).sum(-1).mean(-1)
        lost = torch.zeros_like(lost) if layer.window is not None else lost
        torch.testing.assert_close(found.lost_mass[index], lost, atol=1e-5, rtol=1e-4)
        acting += layer.window is None and float(lost.max()) > 0.01
    assert acting
    assert model.config._attn_implementation == "eager"
