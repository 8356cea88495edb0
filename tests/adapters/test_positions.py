"""Position ids: counted as the model counts them, told apart where it does, given ones honoured."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach, load_cache
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.support.adapters.models import SIZES, prompt

PIPELINE = CachePipeline(window=5)
PADDED = ("camembert", "roberta-prelayernorm", "data2vec-text", "xmod")  # embeddings, positions
IDS = torch.randint(20, 60, (1, 12), generator=torch.Generator().manual_seed(2))
RESTART = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
GAPS = torch.arange(12)[None] * 2
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def far(a, b):
    return float((a - b).abs().max())


@pytest.fixture(params=PADDED)
@torch.no_grad()
def padded(request):
    model = tiny_model(request.param)
    from_zero = model(IDS, position_ids=torch.arange(12)[None]).logits
    assert far(model(IDS).logits, from_zero) > 0.1
    return model


@torch.no_grad()
def test_models_that_count_from_their_padding_index(padded):
    """In every forward without position ids; generate counts from 0, as transformers' does."""
    plain, cached = padded(IDS).logits, padded(IDS[:, :8])
    after = padded(IDS[:, 8:], past_key_values=cached.past_key_values).logits
    tokens = padded.generate(IDS, **GREEDY)
    with attach(padded, PIPELINE, **SIZES) as attached:
        assert attached.served.probe.first == 1
        assert far(padded(IDS).logits, plain) < 1e-4
        cache = attached.read(IDS[:, :8])
        assert far(padded(IDS[:, 8:], past_key_values=cache.fork()).logits, after) < 1e-4
        scores = attached.loglikelihood(IDS[:, :8], IDS[:, 8:])
        wanted = plain.log_softmax(-1)[:, 7:-1].gather(-1, IDS[:, 8:, None])[..., 0]
        assert far(scores, wanted) < 1e-4
        assert torch.equal(padded.generate(IDS, **GREEDY), tokens)
        for question in ("decode", "prompt"):  # goes on with the context's count
            said = attached.ask(
                cache, IDS[:, 8:], question=question, output_logits=True,
                return_dict_in_generate=True, **GREEDY,
            ).logits  # fmt: skip
            assert far(said[0], plain[:, -1]) < 1e-4


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_ids_of_the_padding_index_are_not_counted(padded, masked):
    """Whether a mask shows them or none is given, in later forwards too."""
    ids = IDS.repeat(2, 1)
    ids[0, 5], ids[1, :3], ids[1, 9] = 0, 0, 0
    more = {"attention_mask": torch.ones_like(ids)} if masked else {}
    half = {name: mask[:, :8] for name, mask in more.items()}
    plain, cached = padded(ids, **more).logits, padded(ids[:, :8], **half)
    after = padded(ids[:, 8:], past_key_values=cached.past_key_values, **more).logits
    by_column = padded(ids, position_ids=torch.arange(1, 13)[None].repeat(2, 1), **more).logits
    assert far(plain, by_column) > 0.1
    with attach(padded, PIPELINE, **SIZES) as attached:
        assert attached.served.probe.skips == 0
        assert far(padded(ids, **more).logits, plain) < 1e-4
        embeds = padded.get_input_embeddings()(ids)
        assert far(padded(inputs_embeds=embeds).logits, by_column) < 1e-4  # of no known ids
        cache = attached.read(ids[:, :8], *half.values())
        assert far(padded(ids[:, 8:], past_key_values=cache, **more).logits, after) < 1e-4


@pytest.mark.parametrize("given", [False, True])
@torch.no_grad()
def test_a_model_whose_generate_leaves_positions_to_it(given):
    """Kosmos-2.5 drops position ids, so that generate counts from its padding index too."""
    model, options = tiny_model("kosmos-2.5"), {**GREEDY, "output_logits": True}
    options["return_dict_in_generate"] = True
    if given:
        options["position_ids"] = torch.arange(12)[None] + 40
    whole = model.generate(IDS, **options)
    with attach(model, PIPELINE, **SIZES) as attached:
        found = model.generate(IDS, **options)
        assert far(torch.stack(found.logits), torch.stack(whole.logits)) < 1e-4
        drafted = model.generate(IDS, **options, prompt_lookup_num_tokens=2)
        assert far(torch.stack(drafted.logits), torch.stack(whole.logits)) < 1e-4
        for question in ("decode", "prompt"):
            asked = {name: x for name, x in options.items() if name != "position_ids"}
            said = attached.ask(attached.read(IDS[:, :8]), IDS[:, 8:], question=question, **asked)
            assert far(torch.stack(said.logits), torch.stack(whole.logits)) < 1e-4
        with pytest.raises(UnsupportedError, match="leaves positions to the model"):
            list(attached.generate_many([{"input_ids": IDS[0]}]))


@pytest.mark.parametrize("name", ["gpt_oss", "opt", "bart", "afmoe", "bert", "biogpt", "roberta"])
@torch.no_grad()
def test_models_that_do_not_tell_texts_apart(name):
    """Position ids that restart or have gaps are positions and nothing else, with a cache too."""
    model = tiny_model(name)
    for places in (RESTART + 1, GAPS + 1):
        for more in ({"use_cache": False}, {}):
            plain = model(IDS, position_ids=places, **more).logits
            with attach(model, PIPELINE):
                assert far(model(IDS, position_ids=places, **more).logits, plain) < 1e-4
    with attach(model, PIPELINE), pytest.raises(UnsupportedError, match=r"^cu_seq_lens_q: bounds"):
        model(
            IDS, position_ids=RESTART, use_cache=False, cu_seq_lens_q=torch.tensor([0, 5, 12])
        )  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "glm4v"])
@torch.no_grad()
def test_texts_of_a_model_whose_tokens_have_several_positions(name):
    """Told apart by the first of four, not by the same numbers without it."""
    model = tiny_model(name)
    four = RESTART.expand(4, 1, -1)
    plain, one = (model(IDS, position_ids=x, use_cache=False).logits for x in (four, RESTART))
    assert far(plain, one) > 0.1
    with attach(model, PIPELINE) as attached:
        assert attached.served.probe.apart == {3}
        assert far(model(IDS, position_ids=four, use_cache=False).logits, plain) < 1e-4
        assert far(model(IDS, position_ids=RESTART, use_cache=False).logits, one) < 1e-4
        with pytest.raises(UnsupportedError, match=r"^position_ids: 2 texts"):
            model(IDS, position_ids=four)


@torch.no_grad()
def test_positions_of_a_forward_after_generate(llama, tmp_path):
    """Also on the cache read back from a file."""
    ids = prompt([9])["input_ids"]

    def after(cache, at):
        return llama(ids[:, -1:], past_key_values=cache, position_ids=torch.tensor([[at]])).logits

    options = {**GREEDY, "return_dict_in_generate": True}
    plain = after(llama.generate(ids, **options).past_key_values, 60)
    with attach(llama, PIPELINE, **SIZES):
        cache = llama.generate(ids, **options).past_key_values
        cache.save(tmp_path / "cache")
        assert far(after(cache.fork(), 60), plain) < 1e-4
        assert far(after(cache.fork(), 13), plain) > 0.1
        read = load_cache(llama, PIPELINE, tmp_path / "cache", **SIZES)
        assert far(after(read, 60), plain) < 1e-4


@torch.no_grad()
def test_one_position_for_all_columns(llama):
    ids, one = prompt([9])["input_ids"], torch.tensor([[3]])
    plain = llama(ids, position_ids=one, use_cache=False).logits
    with attach(llama, PIPELINE):
        assert far(llama(ids, position_ids=one, use_cache=False).logits, plain) < 1e-4


@pytest.mark.parametrize("given", ["columns", "tokens", "none"])
@torch.no_grad()
def test_positions_given_after_forwards_that_counted(llama, given):
    """Forwards without position ids count real tokens, transformers' count columns."""
    inputs, more = prompt([9, 5]), torch.tensor([[7], [8]])
    mask = inputs["attention_mask"]
    longer, counted = torch.cat([mask, mask[:, -1:]], 1), (mask.cumsum(1) - 1).clamp(min=0)
    after = {"columns": torch.full((2, 1), 9), "tokens": mask.sum(1)[:, None], "none": None}[given]

    def run(first):
        cache = llama(**inputs, position_ids=first, use_cache=True).past_key_values
        step = {"attention_mask": longer, "position_ids": after, "past_key_values": cache}
        return llama(more, **step).logits

    columns = torch.arange(9).expand(2, -1)
    wanted = run(counted if given == "tokens" else columns)
    with attach(llama, PIPELINE, **SIZES):
        assert given == "columns" or far(run(None), wanted) < 1e-4
        if given == "columns":
            with pytest.raises(
                UnsupportedError, match=r"^position_ids: .* row 1 has seen 5, got 9"
            ):
                run(None)
            assert far(run(columns), wanted) < 1e-4
        if given == "tokens":
            assert far(run(counted), wanted) < 1e-4
