"""What generate does with a tokenizer: stop strings and token healing."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import Request, attach
from tests.support.adapters.models import pipelines, prompt, tiny
from tests.support.adapters.tokenizers import letters

PIPELINE = CachePipeline(window=5)


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}])
@pytest.mark.parametrize("rows", [1, 2])
def test_stop_strings(llama, tokenizer, rows, mode):
    """A row that stops goes on until all have, as transformers has it without an EOS token."""
    inputs = prompt([9, 12] if rows == 2 else [12])
    options = {"do_sample": False, "max_new_tokens": 12, **mode, "tokenizer": tokenizer}

    def run(model, **more):
        torch.manual_seed(2)
        return model.generate(**inputs, **options, **more)

    free = run(llama)
    stops = [tokenizer.decode(row[15]) for row in free]
    plain = run(llama, stop_strings=stops)
    assert plain.shape != free.shape or not torch.equal(plain, free)
    with attach(llama, PIPELINE):
        assert torch.equal(run(llama, stop_strings=stops), plain)
        llama.generation_config.stop_strings = stops
        assert torch.equal(run(llama), plain)
        with pytest.raises(ValueError, match="tokenizer"):
            llama.generate(**inputs, stop_strings=stops, max_new_tokens=3)


@pytest.mark.filterwarnings("ignore:Using .stop_strings. with .*:UserWarning")
def test_a_text_generation_pipeline(llama, tokenizer):
    """transformers' own, which hides the cache and hands its tokenizer on."""
    texts = ["thecat", "adoghere"]
    tokenizer.padding_side = "left"
    generator = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer)
    options = {"max_new_tokens": 12, "do_sample": False, "batch_size": 2}
    free = generator(texts, **options)
    said = [row["generated_text"] for (row,) in free]
    stop = [x.removeprefix(text)[4:6] for x, text in zip(said, texts, strict=True)]
    plain = generator(texts, stop_sequence=stop, **options)
    assert plain != free
    with attach(llama, PIPELINE) as attached:
        assert generator(texts, stop_sequence=stop, **options) == plain
        assert generator(texts, **options) == free
        assert attached.last_report().tokens > 0
    with attach(llama, pipelines()["striped"]):
        assert generator(texts, **options) != free


def test_token_healing(tokenizer):
    """The prompt's last token is chosen anew among its extensions, by a generate inside."""
    model = tiny(bos_token_id=1)
    model.generation_config.bos_token_id = 1
    vocabulary = tokenizer.get_vocab()
    ids = torch.tensor([[1, 20, 130, 140, vocabulary["b"]]])
    options = {"max_new_tokens": 5, "do_sample": False, "tokenizer": tokenizer}
    plain = model.generate(ids, token_healing=True, **options)
    assert not torch.equal(plain, model.generate(ids, **options))
    for pipeline in (PIPELINE, pipelines()["snapkv"]):
        with attach(model, pipeline):
            ours = model.generate(ids, token_healing=True, **options)
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    "mode",
    [
        {}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 2.0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_a_healed_prompt_of_fewer_columns(tokenizer, mode, masked):
    """Blanks at its end are no part of it, in all loops."""
    model = tiny(bos_token_id=1)
    model.generation_config.bos_token_id = 1
    ids = torch.tensor([[20, 130, 140, tokenizer.get_vocab()["b"], 1, 1]])  # decodes to no more
    options = {"max_new_tokens": 5, "do_sample": False, "tokenizer": tokenizer, **mode}
    options |= {"attention_mask": torch.ones_like(ids)} if masked else {}

    def run():
        torch.manual_seed(3)
        return model.generate(ids, token_healing=True, **options)

    plain = run()
    assert plain.shape[1] == 9
    with attach(model, PIPELINE) as attached:
        assert torch.equal(run(), plain)
        if "prompt_lookup_num_tokens" not in mode:
            options["past_key_values"] = cache = attached.new_cache()
            assert torch.equal(run(), plain) and cache.columns == 8
        with pytest.raises(ValueError, match="^tokenizer: token_healing needs"):
            model.generate(ids, token_healing=True, **{**options, "tokenizer": None})


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}])
def test_token_healing_without_ids(tokenizer, mode):
    """There is nothing to heal."""
    model = tiny(bos_token_id=1)
    options = {"max_new_tokens": 5, "do_sample": False, "tokenizer": tokenizer, **mode}
    embedded = model.get_input_embeddings()(prompt([9])["input_ids"])
    plain = model.generate(inputs_embeds=embedded, token_healing=True, **options)
    with attach(model, PIPELINE):
        ours = model.generate(inputs_embeds=embedded, token_healing=True, **options)
    assert torch.equal(ours, plain)


def test_token_healing_that_changes_counted_columns(tokenizer):
    """transformers goes on with the columns of before, so that positions move."""
    model = tiny(bos_token_id=1)
    model.generation_config.bos_token_id = 1
    ids = torch.tensor([[20, 130, 140, tokenizer.get_vocab()["b"], 1, 1]])  # decodes to no more
    options = {"max_new_tokens": 3, "token_healing": True, "tokenizer": tokenizer}
    with attach(model, PIPELINE) as attached:
        cache = attached.read(ids[:, :2])
        for more in ({"prefill_chunk_size": 2}, {"past_key_values": cache}):
            with pytest.raises(UnsupportedError, match="^token_healing: it makes 4 columns of 6"):
                model.generate(ids, **more, **options)
        assert cache.columns == 2
        model.generate(ids[:, :4], past_key_values=cache, **options)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("kind", ["Lora", "PromptTuning"])
def test_token_healing_of_a_wrapped_model(tokenizer, kind):
    """PEFT's generate calls the one of the model inside."""
    peft = pytest.importorskip("peft")
    options = {
        "Lora": {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False},
        "PromptTuning": {"num_virtual_tokens": 12},
    }[kind]
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **options)
    inner = tiny(bos_token_id=1)
    inner.generation_config.bos_token_id = 1
    torch.manual_seed(5)
    model = peft.get_peft_model(inner, config).eval()
    ids = torch.tensor([[1, 20, 130, 140, tokenizer.get_vocab()["b"]]])
    given = {"max_new_tokens": 5, "do_sample": False, "tokenizer": tokenizer}
    plain = model.generate(input_ids=ids, token_healing=True, **given)
    assert not torch.equal(plain, model.generate(input_ids=ids, **given))
    with attach(model, PIPELINE):
        assert torch.equal(model.generate(input_ids=ids, token_healing=True, **given), plain)


def test_assistant_of_another_vocabulary(llama, tokenizer):
    """Drafts are translated by both tokenizers."""
    given = {
        "assistant_model": tiny(seed=5, vocab_size=199), "tokenizer": tokenizer,
        "assistant_tokenizer": tokenizer, "max_new_tokens": 12, "do_sample": False,
    }  # fmt: skip
    ids = prompt([9])["input_ids"].clamp(max=198)
    plain = llama.generate(ids, **given)
    with attach(llama, PIPELINE):
        assert torch.equal(plain, llama.generate(ids, **given))


@pytest.mark.parametrize("stops", ["", [""]])
@pytest.mark.parametrize("where", ["call", "generation_config", "model"])
def test_an_empty_stop_string(llama, tokenizer, stops, where, monkeypatch):
    """It stops after the first token, in transformers too."""
    options = {"tokenizer": tokenizer, "max_new_tokens": 6, "do_sample": False}
    config = transformers.GenerationConfig(stop_strings=stops, pad_token_id=0)
    if where == "model":
        monkeypatch.setattr(llama.generation_config, "stop_strings", stops)
    options |= {"call": {"stop_strings": stops}, "generation_config": {where: config}}.get(
        where, {}
    )
    plain = llama.generate(**prompt([9]), **options)
    assert plain.shape[1] == 10
    with attach(llama, PIPELINE) as attached:
        assert torch.equal(llama.generate(**prompt([9]), **options), plain)
        ids = prompt([9])["input_ids"][0]
        request = Request(ids, max_new_tokens=6, do_sample=False, stop_strings=stops)
        (one,) = attached.generate_many([request], tokenizer=tokenizer)
    assert one.tokens == plain[0, 9:].tolist()
