"""Policies on models of every kind, beside float64 attention over what they admit."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, LocalAttention, RandomGate, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.probe import ModelRefused
from kvpolicy.adapters.hf.rule.tiny import causal_types, multimodal_types, tiny_model
from tests.adapters.models.test_attached import KINDS, NOT_BUILT, NOT_RUN
from tests.support.adapters.policy_oracle import oracle
from tests.support.adapters.versions import NEWEST

WINDOW, PROMPT, LENGTH = 5, 27, 40
POLICIES = [LocalAttention(window=WINDOW, sinks=2), RandomGate(sparsity=0.5, seed=3)]
BOUND = 1e-4  # of the logits' spread
TEXT_DECODERS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl", "idefics3", "aya_vision", "lfm2_vl",
    "smolvlm", "mistral3", "shieldgemma2", "glm4v", "kosmos-2.5", "chameleon", "deepseek_ocr2",
    "ernie4_5_vl_moe", "granite4_vision", "granite_docling", "hunyuan_vl", "molmo2",
    "nemotron_h_omni",
)  # fmt: skip


def logits(model, ids, attached=None):
    """Of `ids` `[1, S]`: of one forward, or of a prompt and steps with what is attached."""
    if attached is None:
        return model(input_ids=ids, use_cache=False).logits
    cache = attached.new_cache()
    parts = [model(input_ids=ids[:, :PROMPT], past_key_values=cache).logits]
    cache.end_prompt()
    for place in range(PROMPT, LENGTH):
        parts.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(parts, 1)


def far(found, wanted):
    return float((found - wanted).abs().max() / wanted.std())


@torch.no_grad()
def check(model):
    ids = torch.randint(20, 60, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    plain = logits(model, ids)
    for admission in POLICIES:
        with oracle(model, admission, WINDOW) as run:
            wanted = logits(model, ids)
        with attach(model, CachePipeline(window=WINDOW, admission=admission), page_size=4) as on:
            assert far(logits(model, ids, on), wanted) < BOUND
        if run.acted:
            assert far(wanted, plain) > 100 * BOUND  # the policy did something


@pytest.mark.parametrize("name", KINDS)
def test_policies_admit_what_the_oracle_says(name):
    check(tiny_model(name).eval())


@pytest.mark.parametrize("name", ["qwen2_vl", "llava"])
def test_policies_on_text_decoders(name):
    check(tiny_model(name).eval())


def served_or_refused(name):
    try:
        model = tiny_model(name).eval()
    except ImportError as error:
        pytest.skip(f"transformers itself needs a package for it: {error}")
    try:
        attach(model, CachePipeline(window=WINDOW)).detach()
    except UnsupportedError as refused:
        assert isinstance(refused, ModelRefused) or name == "bigbird_pegasus"  # is_causal=False
        return
    check(model)


@NEWEST
@pytest.mark.slow
@pytest.mark.parametrize("name", causal_types())
def test_every_type(name):
    if name in (*NOT_RUN, *NOT_BUILT):
        pytest.skip("the plain model does not run on ids alone")
    served_or_refused(name)


@NEWEST
@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT_DECODERS)
def test_text_decoders_of_multimodal_types(name):
    assert name in multimodal_types()
    check(tiny_model(name).eval())
