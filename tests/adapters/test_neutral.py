"""A pipeline that leaves nothing out generates what the plain model generates."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer

from kvpolicy import CachePipeline, Quest, RandomGate, SnapKV
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import KINDS, error, prompt, tiny

PIPELINES = {
    "window": CachePipeline(window=5),
    "acting": CachePipeline(
        admission=RandomGate(sparsity=0.0),
        selection=Quest(budget=4000),
        eviction=SnapKV(budget=3000, when="decode"),
        window=5,
    ),
}
DICT = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


CASES = {
    "greedy": {"max_new_tokens": 14},
    "max_length": {"max_length": 30},
    "chunks": {"max_new_tokens": 10, "prefill_chunk_size": 4},
    "sampled": {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_k": 20},
    "returns": {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3},
    "processors": {"max_new_tokens": 12, "repetition_penalty": 1.4, "min_new_tokens": 3},
    "beams": {"max_new_tokens": 8, "num_beams": 3},
    "beams_returned": {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2},
    "beam_sample": {"max_new_tokens": 6, "num_beams": 2, "do_sample": True},
    "hidden": {"max_new_tokens": 6, "output_hidden_states": True, **DICT},
}


def both(model, pipeline, *args, **options):
    """Outputs of the plain and of the attached model, from the same seed."""
    if "generation_config" not in options and len(args) < 2:
        options.setdefault("do_sample", False)
    torch.manual_seed(4)
    plain = model.generate(*args, **{k: v for k, v in options.items() if "chunk" not in k})
    torch.manual_seed(4)
    with attach(model, pipeline, page_size=4, interval=8):
        ours = model.generate(*args, **options)
    return plain, ours


@pytest.mark.parametrize(
    "model, name",
    [
        pytest.param(kind, name, marks=pytest.mark.slow if dense and kind != "llama" else ())
        for name, dense in (("acting", False), ("window", True))
        for kind in KINDS
    ],
    indirect=["model"],
)
@pytest.mark.parametrize("case", CASES)
def test_tokens(model, case, name):
    plain, ours = both(model, PIPELINES[name], **prompt([17, 11]), **CASES[case])
    if isinstance(plain, torch.Tensor):
        assert torch.equal(plain, ours)
        return
    assert torch.equal(plain.sequences, ours.sequences)
    assert error(plain, ours) < 1e-4
    if "hidden_states" in plain:
        for a, b in zip(plain.hidden_states, ours.hidden_states, strict=True):
            real = prompt([17, 11])["attention_mask"].bool()[:, -a[-1].shape[1] :]
            assert (a[-1] - b[-1])[real].abs().max() < 1e-3


@pytest.mark.parametrize("case", ["prompt_lookup", "assistant"])
def test_assisted(model, case):
    ids = prompt([9])["input_ids"].repeat(1, 3)
    options = {"max_new_tokens": 20}
    if case == "prompt_lookup":
        options["prompt_lookup_num_tokens"] = 3
    else:
        options["assistant_model"] = tiny("llama", seed=5)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    with attach(model, PIPELINES["window"]):
        assert torch.equal(plain, model.generate(ids, do_sample=False, **options))


def test_every_case_of_options(llama):
    """What a call can say in other ways than by keywords."""
    inputs, pipeline = prompt([9]), PIPELINES["window"]
    ids = inputs["input_ids"]
    config = GenerationConfig(max_new_tokens=7, do_sample=True, pad_token_id=0)
    for args, options in (
        ((ids,), {"max_new_tokens": 5}),
        ((ids, config), {}),
        ((), {"inputs": ids, "generation_config": config}),
        ((), {"inputs_embeds": llama.model.embed_tokens(ids), "max_new_tokens": 5}),
        ((), {"input_ids": ids, "max_new_tokens": 1}),
        ((), {"input_ids": ids, "position_ids": torch.arange(3, 12)[None], "max_new_tokens": 5}),
    ):
        assert torch.equal(*both(llama, pipeline, *args, **options))


def test_model_defaults_decide(llama):
    llama.generation_config.num_beams = 3
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0)
    inputs = prompt([9, 9])
    plain = llama.generate(**inputs, generation_config=config)
    with attach(llama, PIPELINES["window"]) as attachment:
        assert torch.equal(plain, llama.generate(**inputs, generation_config=config))
        assert "beam" in attachment.decoding


def test_from_one_bos_token():
    model = tiny("llama")
    model.generation_config.bos_token_id = 5
    plain, ours = both(model, PIPELINES["acting"], max_new_tokens=12)
    assert torch.equal(plain, ours)


def test_rows_end_at_different_times(model):
    inputs = prompt([12, 9, 12])
    free = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    ends = [int(free[0, 14]), int(free[1, 17])]
    plain, ours = both(
        model, PIPELINES["acting"], **inputs, max_new_tokens=12, eos_token_id=ends, **DICT
    )
    assert torch.equal(plain.sequences, ours.sequences)
    assert (plain.sequences == 0)[:, 12:].any()
    assert len(plain.scores) == len(ours.scores)


def test_stopping_criteria(llama):
    class After(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            done = ids.shape[1] >= 15
            return torch.full(ids.shape[:1], done, dtype=torch.bool)

    plain, ours = both(
        llama,
        PIPELINES["window"],
        **prompt([9, 12]),
        max_new_tokens=12,
        stopping_criteria=[After()],
    )
    assert torch.equal(plain, ours) and ours.shape[1] == 15


def test_right_padding(model):
    """Only the logits of real tokens: transformers does not generate after right padding."""
    inputs = prompt([17, 11], side="right")
    real = inputs["attention_mask"].bool()
    plain = model(**inputs).logits
    with attach(model, PIPELINES["window"]):
        assert (model(**inputs).logits - plain)[real].abs().max() < 1e-4


def test_streamer(llama):
    class Words:
        def decode(self, ids, **kwargs):
            return " ".join(str(int(i)) for i in ids) + " "

    ids = prompt([9])["input_ids"]
    plain = llama.generate(ids, max_new_tokens=10, do_sample=False)
    with attach(llama, PIPELINES["window"]):
        streamer = TextIteratorStreamer(Words(), skip_prompt=True)
        out = llama.generate(ids, max_new_tokens=10, do_sample=False, streamer=streamer)
    said = [int(word) for word in "".join(streamer).split()]
    assert said == plain[0, 9:].tolist() == out[0, 9:].tolist()


def test_guidance(llama):
    options = {"guidance_scale": 1.5, "max_new_tokens": 6}
    plain, ours = both(llama, PIPELINES["window"], **prompt([9]), **options)
    assert torch.equal(plain, ours)


def test_padding_in_the_middle(llama, qwen3):
    for model in (llama, qwen3):
        inputs, more = prompt([12, 7]), prompt([3, 5], seed=2)
        pipeline = PIPELINES["window"]
        with attach(model, pipeline) as attachment:
            cache = attachment.new_cache()
            first = model.generate(
                **inputs, past_key_values=cache, max_new_tokens=4, do_sample=False
            )
            ids = torch.cat([first, more["input_ids"]], 1)
            said = torch.ones(2, 4, dtype=torch.long)
            mask = torch.cat([inputs["attention_mask"], said, more["attention_mask"]], 1)
            options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
            whole = model.generate(ids, past_key_values=cache.fork(), **options)
            tail = model.generate(ids[:, 15:], past_key_values=cache, **options)
        assert cache.get_seq_length() == whole.shape[1] - 1 > max(cache.state.lengths)
        plain = model.generate(ids, **options)
        assert torch.equal(plain, whole)
        assert torch.equal(plain[:, 15:], tail)
