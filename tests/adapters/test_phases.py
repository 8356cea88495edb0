"""Contexts and questions: read once, evict once, ask often."""

from __future__ import annotations

import warnings

import pytest
import torch

from kvpolicy import CachePipeline, PhaseError, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.faults import digest
from tests.support.adapters.models import SIZES, error, pipelines, prompt

CONTEXT, QUESTION = prompt([40, 29]), prompt([7, 4], seed=5)
GREEDY = {
    "max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
NAMES = ["striped", "gate", "quest", "snapkv", "all", "gate-quest-snapkv"]


def by_hand(model, attached, context, question, kind):
    """Logits of a fresh cache, token by token, of one sequence."""
    cache = attached.new_cache()
    model(context[None], past_key_values=cache)
    cache.end_prompt()
    if kind == "prompt":
        cache.phase = "prompt"
        logits = model(question[None], past_key_values=cache).logits[0, -1]
        for row in cache.state.sequences:
            row.prompt_open = False
        cache.phase = "decode"
    else:
        for token in question:
            logits = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
    found = []
    for _ in range(5):
        found.append(logits)
        logits = model(logits.argmax().view(1, 1), past_key_values=cache).logits[0, -1]
    found.append(logits)
    return torch.stack(found), cache


def real(inputs, row):
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()]


@pytest.mark.parametrize(
    "name, kind, chunk",
    [
        pytest.param(name, kind, chunk, marks=pytest.mark.slow if (n + m + k) % 2 else ())
        for n, name in enumerate(NAMES)
        for m, kind in enumerate(("decode", "prompt"))
        for k, chunk in enumerate((None, 11))
    ],
)
def test_a_batch_is_asked(llama, name, kind, chunk):
    """As fresh runs of each sequence alone; the context's cache is as before."""
    with attach(llama, pipelines()[name], **{**SIZES, "rollback": 64}) as attached:
        attached.forwards.warned = True
        cache = attached.read(**CONTEXT, chunk_size=chunk)
        assert cache.phase == "decode"
        before, evicted = digest(cache), cache.report().evicted
        for _ in range(2):
            out = attached.ask(cache, **QUESTION, question=kind, **GREEDY)
            for row in (0, 1):
                wanted, alone = by_hand(
                    llama, attached, real(CONTEXT, row), real(QUESTION, row), kind
                )
                ours = torch.stack(out.logits)[:, row]
                assert (ours - wanted).abs().max() < 1e-3
                kept = out.past_key_values.state.kept(1, row, 0).tolist()
                assert kept == alone.state.kept(1, 0, 0).tolist()
        assert digest(cache) == before and cache.report().evicted == evicted


def test_kinds_of_questions_differ(llama):
    with attach(llama, pipelines()["quest"], **SIZES) as attached:
        cache = attached.read(**CONTEXT)
        decoded, read = (
            attached.ask(cache, **QUESTION, question=kind, **GREEDY)
            for kind in ("decode", "prompt")
        )
        assert error(decoded, read) > 1e-2


def test_no_second_eviction(llama):
    """Unlike a next turn by generate, whose end is a prompt's end."""
    with attach(llama, pipelines()["snapkv"], **SIZES) as attached:
        cache = attached.read(**prompt([40]))
        evicted = cache.report().evicted
        ids = prompt([7], seed=5)["input_ids"]
        for kind in ("decode", "prompt"):
            out = attached.ask(cache, ids, question=kind, **GREEDY)
            assert out.past_key_values.report().evicted == evicted
        turn = cache.fork()
        llama.generate(
            torch.cat([prompt([40])["input_ids"], ids], 1), past_key_values=turn, max_new_tokens=2
        )
        assert turn.report().evicted != evicted


def test_many_questions_about_one_context(llama):
    """And several answers or beams to each."""
    with attach(llama, pipelines()["gate-quest-snapkv"], **SIZES) as attached:
        cache = attached.read(**prompt([40]))
        both = attached.ask(cache, **QUESTION, max_new_tokens=5, do_sample=False)
        for row in (0, 1):
            alone = attached.ask(
                cache, real(QUESTION, row)[None], max_new_tokens=5, do_sample=False
            )
            assert torch.equal(both[row, 7:], alone[0, -5:])
        torch.manual_seed(1)
        many = attached.ask(
            cache, **QUESTION, max_new_tokens=5, do_sample=True, num_return_sequences=3
        )
        assert many.shape == (6, 12)
        beams = attached.ask(cache, **QUESTION, max_new_tokens=5, num_beams=2, do_sample=False)
        assert beams.shape == (2, 12)


def test_a_neutral_pipeline_answers_as_the_plain_model(llama):
    whole = {k: torch.cat([CONTEXT[k], QUESTION[k]], 1) for k in CONTEXT}
    plain = llama.generate(**whole, **GREEDY)
    with attach(llama, CachePipeline(window=5)) as attached:
        cache = attached.read(**CONTEXT)
        for kind in ("decode", "prompt"):
            assert error(attached.ask(cache, **QUESTION, question=kind, **GREEDY), plain) < 1e-4


@pytest.mark.parametrize("kind", ["decode", "prompt"])
def test_loglikelihood(llama, kind):
    """A bare forward reads everything; this one selects and evicts after the context."""
    context, more = prompt([40])["input_ids"], prompt([7], seed=5)["input_ids"]
    whole = torch.cat([context, more], 1)
    plain = llama(whole).logits[:, 39:-1].log_softmax(-1).gather(-1, more[..., None]).squeeze(-1)
    with attach(llama, CachePipeline(window=5)) as attached:
        ours = attached.loglikelihood(context, more, question=kind)
        assert (ours - plain).abs().max() < 1e-4
    for name in ("quest", "snapkv"):
        with attach(llama, pipelines()[name], **SIZES) as attached:
            ours = attached.loglikelihood(context, more, question=kind)
            moves = (ours - plain).abs().max() > 1e-2
            assert moves == (name == "snapkv" or kind == "decode")


@pytest.mark.parametrize("name", ["neutral", "quest", "snapkv", "all"])
@pytest.mark.parametrize("kind", ["decode", "prompt"])
def test_loglikelihood_of_a_padded_batch(llama, name, kind):
    """As of each pair alone; padding counts nothing."""
    pipeline = CachePipeline(window=5) if name == "neutral" else pipelines()[name]
    more = prompt([7, 4], side="right", seed=5)
    with attach(llama, pipeline, **SIZES) as attached:
        ours = attached.loglikelihood(
            CONTEXT["input_ids"], more["input_ids"], CONTEXT["attention_mask"],
            more["attention_mask"], question=kind,
        )  # fmt: skip
        assert ours.shape == (2, 7) and (ours[1, 4:] == 0).all()
        for row, n in ((0, 7), (1, 4)):
            alone = attached.loglikelihood(
                real(CONTEXT, row)[None], real(more, row)[None], question=kind
            )
            assert (ours[row, :n] - alone).abs().max() < 1e-4


def test_loglikelihood_refuses_padding_between_context_and_continuation(llama):
    right, more = prompt([9, 6], side="right"), prompt([5, 3])
    with attach(llama, CachePipeline(window=5)) as attached:
        with pytest.raises(ValueError, match="^attention_mask: wanted contexts padded on the left"):
            attached.loglikelihood(right["input_ids"], more["input_ids"], right["attention_mask"])
        ids = prompt([9, 9])["input_ids"]
        for mask in (more["attention_mask"], torch.ones(2, 4)):
            with pytest.raises(ValueError, match="^continuation_mask: wanted"):
                attached.loglikelihood(ids, more["input_ids"], continuation_mask=mask)
        with pytest.raises(UnsupportedError, match="^continuation_mask: wanted 0 and 1, got 2"):
            attached.loglikelihood(ids, ids, continuation_mask=torch.full((2, 9), 2))


def test_last_report(llama):
    with attach(llama, pipelines()["snapkv"], **SIZES) as attached:
        with pytest.raises(PhaseError, match="last_report"):
            attached.last_report()
        llama.generate(**prompt([40]), max_new_tokens=3)
        wanted = attached.last_report()
        cache = attached.new_cache()
        llama.generate(**prompt([40]), max_new_tokens=3, past_key_values=cache)
        assert wanted.evicted == cache.report().evicted and wanted.evicted[0][0] > 0
        attached.forwards.warned = True
        llama(prompt([9])["input_ids"], use_cache=False)
        assert attached.last_report().tokens == 9


@pytest.mark.parametrize("name", ["quest", "snapkv", "striped", "none"])
@pytest.mark.parametrize("loop", ["no cache", "cache"])
def test_a_loop_that_never_ends_its_prompt_is_told_once(llama, name, loop):
    pipeline = CachePipeline(window=5) if name == "none" else pipelines()[name]
    ids = prompt([20])["input_ids"]
    for attempt in range(2):
        with (
            attach(llama, pipeline, **SIZES) as attached,
            warnings.catch_warnings(record=True) as told,
        ):
            warnings.simplefilter("always")
            for _ in range(2):
                cache = attached.new_cache() if loop == "cache" else None
                for part in (ids, ids[:, :1], ids[:, :1]):
                    llama(part, past_key_values=cache)
            attached.read(ids)
            llama.generate(ids, max_new_tokens=3)
        texts = [str(w.message) for w in told]
        assert len(texts) == (name in ("quest", "snapkv")), attempt
        assert all("attached.read(context)" in text and "end_prompt()" in text for text in texts)


def test_a_loop_that_ends_its_prompt_is_not_told(llama):
    ids = prompt([20])["input_ids"]
    with attach(llama, pipelines()["snapkv"], **SIZES) as attached:
        cache = attached.new_cache()
        for part in (ids, ids[:, :1]):
            llama(part, past_key_values=cache)
        cache.end_prompt()
        for _ in range(3):
            llama(ids[:, :1], past_key_values=cache)


def test_what_is_refused(llama):
    with attach(llama, pipelines()["snapkv"], **SIZES) as attached:
        fresh = attached.new_cache()
        ids = prompt([5])["input_ids"]
        with pytest.raises(PhaseError, match="attached.read"):
            attached.ask(fresh, ids)
        cache = attached.read(**CONTEXT)
        with pytest.raises(ValueError, match="question: wanted one of decode, prompt"):
            attached.ask(cache, **QUESTION, question="turn")
        for name in ("past_key_values", "inputs_embeds", "inputs"):
            with pytest.raises(TypeError, match=f"^{name}: ask gives it"):
                attached.ask(cache, **QUESTION, **{name: ids})
        with pytest.raises(ValueError, match="^attention_mask: wanted .2, 7., of the question"):
            attached.ask(cache, QUESTION["input_ids"], QUESTION["attention_mask"][:1])
        with pytest.raises(ValueError, match="wanted 1 or 2 questions"):
            attached.ask(cache, ids)
        with pytest.raises(
            ValueError, match="input_ids, inputs_embeds: wanted exactly one, got neither"
        ):
            attached.read()
        with pytest.raises(ValueError, match="attention_mask: wanted"):
            attached.read(ids, CONTEXT["attention_mask"])
        with pytest.raises(ValueError, match="chunk_size"):
            attached.read(ids, chunk_size=0)


def test_a_next_turn_is_read(llama):
    with attach(llama, pipelines()["snapkv"], **SIZES) as attached:
        cache = attached.read(**CONTEXT)
        longer = attached.read(**QUESTION, cache=cache.fork())
        assert longer.columns == 47 and longer.state.lengths == [47, 33]
        assert longer.report().evicted != cache.report().evicted
