"""Models of every kind with a pipeline attached, beside themselves without one.

It shares no code with the probe: a plain forward over the whole text decides, and what plain
generate says to each sequence alone.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import DynamicCache

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach, load_cache
from kvpolicy.adapters.hf.rule.probe import ModelRefused
from kvpolicy.adapters.hf.rule.tiny import causal_types, tiny_model
from tests.support.adapters.versions import NEWEST

# Softcap and windows, sinks, chunks and no RoPE, states beside attention and in it, other value
# channels, shared keys, fused keys, a decoder behind a head of that name, a decoder of two parts.
KINDS = (
    "gemma2", "gpt_oss", "llama4_text", "qwen3_5_text", "falcon_h1", "mimo_v2_flash", "gemma4_text",
    "phi3", "modernbert-decoder", "whisper",
)  # fmt: skip
# Plain models that do not run on these inputs.
NOT_RUN = ("deepseek_v2", "gemma4_unified_assistant", "musicgen", "musicgen_melody")
# Configs that transformers itself does not build.
NOT_BUILT = ("gemma4_assistant",)
PROMPT, TURN, LENGTH = 27, 33, 40  # columns; the tiny models' windows and chunks are far shorter
HIDDEN = 6  # columns of the second row
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def text(model, probe):
    """Ids `[2, LENGTH]`, which columns are real, and plain logits."""
    ids = torch.randint(20, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if probe.hides:
        mask[1, :HIDDEN] = 0
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    places = (mask.cumsum(1) - 1).clamp(min=0) + probe.first
    try:
        logits = model(**given, position_ids=places).logits
    except TypeError:  # it takes none and counts by the mask
        logits = model(**given).logits
    return ids, mask, logits


def far(found, wanted, mask):
    real = mask.bool()
    return float((found - wanted)[real].abs().max() / wanted[real].std())


@torch.no_grad()
def check(name):
    model = tiny_model(name).eval()
    with attach(model, CachePipeline(window=5)) as attached:
        probe = attached.served.probe
    ids, mask, wanted = text(model, probe)
    prompt = {"input_ids": ids[:, :PROMPT], "attention_mask": mask[:, :PROMPT]}
    alone = [
        model.generate(input_ids=row[None, hidden:PROMPT], **GREEDY)[0, PROMPT - hidden :]
        for row, hidden in zip(ids, (mask == 0).sum(1).tolist(), strict=True)
    ]
    with attach(model, CachePipeline(window=5)) as attached:
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert far(whole, wanted, mask) < 1e-4
        cache, parts = attached.new_cache(), []
        # States of a model's own layers take hidden columns in the first forward alone, and some
        # go on by single columns.
        cuts = [0, PROMPT, TURN] if probe.own else [0, 11, PROMPT, TURN]
        if not probe.goes_on:
            cuts = [0, PROMPT, *range(PROMPT + 1, TURN + 1)]
        for start, end in itertools.pairwise(cuts):
            if start == PROMPT:
                cache.end_prompt()
                cache.begin_prompt()
            given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
            parts.append(model(**given, past_key_values=cache).logits)
        cache.end_prompt()
        for place in range(TURN, LENGTH):
            given = {"input_ids": ids[:, place : place + 1], "attention_mask": mask[:, : place + 1]}
            parts.append(model(**given, past_key_values=cache).logits)
        assert far(torch.cat(parts, 1), wanted, mask) < 1e-4
        found = model.generate(**prompt, **GREEDY)[:, PROMPT:]
        assert torch.equal(found, torch.stack(alone))


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    check(name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "lfm2"])
def test_a_model_is_served_in_every_dtype(name, dtype):
    model = tiny_model(name).eval().to(dtype)
    ids = torch.randint(20, 60, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with attach(model, CachePipeline(window=5)) as attached, torch.no_grad():
        assert attached.spec.dtype == dtype
        assert all(layer.pre_rope is not None for layer in attached.served.layers)
        assert torch.isfinite(model(input_ids=ids).logits).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*KINDS, "blenderbot"])
def test_captured_steps_go_on(name):
    """What a graph holds fast, such as a position counted on the host, would repeat."""
    model = tiny_model(name).eval().cuda()
    ids = torch.randint(20, 60, (1, PROMPT), generator=torch.Generator().manual_seed(1)).cuda()
    plain = model.generate(input_ids=ids, **GREEDY)
    with attach(model, CachePipeline(window=5), page_size=4) as attached:
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), plain)
        assert attached.decoding == "captured" or attached.decoding.startswith("eager: ")


@NEWEST
@pytest.mark.slow
@pytest.mark.parametrize("name", causal_types())
def test_every_type(name):
    if name in (*NOT_RUN, *NOT_BUILT):
        pytest.skip("the plain model does not run on ids alone")
    try:
        model = tiny_model(name)
    except ImportError as error:
        pytest.skip(f"transformers itself needs a package for it: {error}")
    try:
        attach(model, CachePipeline(window=5)).detach()
    except UnsupportedError as refused:
        assert isinstance(refused, ModelRefused) or name == "bigbird_pegasus"  # is_causal=False
        return
    check(name)


@NEWEST
def test_states_that_take_hidden_columns_in_refuse_them():
    model = tiny_model("recurrent_gemma").eval()
    ids, mask = torch.arange(20, 44).view(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :3] = 0
    with attach(model, CachePipeline(window=5)) as attached, torch.no_grad():
        assert not attached.served.probe.hides
        with pytest.raises(UnsupportedError, match="give it rows of one length"):
            model(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def test_states_that_do_not_go_on_by_chunks_refuse_them():
    model = tiny_model("jamba").eval()
    ids = torch.arange(20, 44)[None]
    plain = model(input_ids=ids, use_cache=False).logits
    with attach(model, CachePipeline(window=5)) as attached:
        cache = attached.read(ids[:, :12])
        with pytest.raises(UnsupportedError, match="12 columns after others"):
            model(input_ids=ids[:, 12:], past_key_values=cache)
        said = attached.loglikelihood(ids[:, :12], ids[:, 12:])  # one by one
    wanted = plain.log_softmax(-1)[:, 11:-1].gather(-1, ids[:, 12:, None]).squeeze(-1)
    torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["roberta", "xmod"])
def test_positions_that_begin_after_those_of_padding(name, tmp_path):
    """In forwards that are told none; transformers' generate counts from 0 in any model."""
    model = tiny_model(name).eval()
    ids = torch.arange(20, 44)[None]
    plain = model(input_ids=ids, use_cache=False).logits
    spread = plain.std()
    told = model(input_ids=ids, position_ids=torch.arange(24)[None], use_cache=False).logits
    assert (told - plain).abs().max() > 0.1 * spread  # it matters
    with attach(model, CachePipeline(window=5)) as attached:
        assert (model(input_ids=ids).logits - plain).abs().max() < 1e-4 * spread
        cache = attached.read(ids[:, :12])
        cache.save(tmp_path / "cache.safetensors")
        loaded = load_cache(model, attached.pipeline, tmp_path / "cache.safetensors")
        for each in (cache.fork(), loaded):
            each.begin_prompt()
            found = model(input_ids=ids[:, 12:], past_key_values=each).logits
            assert (found - plain[:, 12:]).abs().max() < 1e-4 * spread
        answer = attached.ask(cache, ids[:, 12:], **GREEDY)
        assert answer[0, 12] == plain[0, -1].argmax()
    with attach(model, CachePipeline(window=5)):
        found = model.generate(input_ids=ids, **GREEDY)
    assert torch.equal(found, model.generate(input_ids=ids, **GREEDY))


@pytest.fixture(scope="module")
def tempered():
    """Its attention makes queries larger from every 16th column on, which it counts by itself."""
    return tiny_model("llama4_text", floor_scale=16).eval()


@torch.no_grad()
def test_columns_that_attention_counts_by_itself(tempered):
    ids = torch.randint(20, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    plain = tempered(input_ids=ids, use_cache=False).logits
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with attach(tempered, CachePipeline(window=5)) as attached:
        probe = attached.served.probe
        assert probe.counts.startswith("modeling_llama4.py:") and probe.counts_from == 16
        assert probe.counting == (3, 7)  # those without RoPE
        parts, cache = [], attached.new_cache()
        for start, end in itertools.pairwise([0, 11, PROMPT, LENGTH]):
            parts.append(tempered(input_ids=ids[:, start:end], past_key_values=cache).logits)
        assert far(torch.cat(parts, 1), plain, torch.ones_like(ids)) < 1e-4
        cache = attached.new_cache()
        tempered(input_ids=ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        with pytest.raises(UnsupportedError, match="counts columns, hidden ones too .* from 16"):
            tempered(input_ids=ids[:, 12:20], attention_mask=mask[:, :20], past_key_values=cache)
        with pytest.raises(UnsupportedError, match="counts columns, hidden ones too .* from 16"):
            tempered(input_ids=ids, attention_mask=mask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 2])
def test_captured_steps_count_columns(tempered, rows):
    model = tempered.cuda()
    ids = torch.randint(20, 60, (rows, PROMPT), generator=torch.Generator().manual_seed(1)).cuda()
    plain = model.generate(input_ids=ids, **GREEDY)  # past column 32
    with attach(model, CachePipeline(window=5), page_size=4) as attached:
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), plain)
        assert attached.decoding == "captured"


@NEWEST
@pytest.mark.parametrize("name", ["idefics2", "idefics3", "smolvlm"])
def test_a_model_that_makes_a_cache_around_its_decoder(name):
    model, ids = tiny_model(name).eval(), torch.randint(20, 60, (2, 12))
    guided = {"max_new_tokens": 4, "do_sample": False, "guidance_scale": 1.5}
    plain = model.generate(ids, **guided)
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids)
        with attach(model, CachePipeline(window=5), page_size=4) as attached:
            found = model(input_ids=ids, labels=ids)
            assert attached.last_report().tokens == 24
            assert found.past_key_values.columns == 12
            assert torch.equal(model.generate(ids, **guided), plain)
            with pytest.raises(TypeError, match="wanted a KVPolicyCache"):
                model(input_ids=ids, past_key_values=DynamicCache())
            with pytest.raises(ValueError, match="input_ids: wanted token ids"):
                model.model.text_model()
            with pytest.raises(TypeError, match="wanted a KVPolicyCache"):
                model.model.text_model(input_ids=ids, past_key_values=DynamicCache())
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.loss, wanted.loss)
