"""Classifiers of sequences read one column a row: a real one, or the call is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import prompt, tiny

PIPELINE = CachePipeline(window=5)
SMALL = {"vocab_size": 200, "pad_token_id": 0, "num_labels": 3}


def classifier(kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = tiny().config
        config.num_labels, config.pad_token_id = 3, 0
        return transformers.LlamaForSequenceClassification(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **SMALL)
        return transformers.GPT2ForSequenceClassification(config).eval()
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        is_decoder=True, **SMALL,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def differs(model, inputs):
    """Whether rows of one length say something else of a padded row than `inputs` do."""
    alone = {k: v[1:, inputs["attention_mask"][1].bool()] for k, v in inputs.items()}
    return (model(**inputs).logits[1] - model(**alone).logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "side"), [("llama", "left"), ("llama", "right"), ("gpt2", "right"), ("bert", "right")]
)
@torch.no_grad()
def test_real_columns(kind, side):
    model, inputs = classifier(kind), prompt([9, 6], side=side)
    labels = torch.tensor([0, 2])
    plain = model(**inputs, labels=labels)
    with attach(model, PIPELINE):
        ours = model(**inputs, labels=labels)
    assert torch.allclose(ours.logits, plain.logits, atol=1e-5)
    assert torch.allclose(ours.loss, plain.loss, atol=1e-5)


@torch.no_grad()
def embedded(model):
    inputs = prompt([9, 6], side="right")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


def padded_by_another(model):
    inputs = prompt([9, 6], side="right")
    return inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 1)}


def without_a_pad_token(model):
    model.config.pad_token_id = None
    return {k: v[1:] for k, v in prompt([9, 6], side="right").items()}


def on_the_left(model):
    return prompt([9, 6], side="left")


@pytest.mark.parametrize(
    ("kind", "made", "name"),
    [
        ("llama", embedded, "inputs_embeds"),
        ("gpt2", embedded, "inputs_embeds"),
        ("llama", padded_by_another, "attention_mask"),
        ("llama", without_a_pad_token, "attention_mask"),
        ("bert", on_the_left, "attention_mask"),
    ],
)
@torch.no_grad()
def test_padded_columns_are_refused(kind, made, name):
    model = classifier(kind)
    inputs = made(model)
    if inputs["attention_mask"].shape[0] > 1:
        assert differs(model, inputs), "the plain model would read the padded column"
    with attach(model, PIPELINE) as attached:
        with pytest.raises(UnsupportedError, match=f"^{name}: .* padded column"):
            model(**inputs)
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match=f"^{name}: .* padded column"):
            model(*inputs.values(), past_key_values=cache) if name == "attention_mask" else model(
                **inputs, past_key_values=cache
            )
        assert cache.columns == 0


@torch.no_grad()
def test_a_head_of_choices_reads_real_columns():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **SMALL)
    model = transformers.GPT2DoubleHeadsModel(config).eval()
    inputs = prompt([9, 6], side="right")
    last = torch.tensor([8, 5])
    wanted = model(**inputs, mc_token_ids=last).mc_logits
    far = (model(**inputs).mc_logits - wanted).abs().max()
    with attach(model, PIPELINE):
        for asked in ({}, {"mc_token_ids": torch.tensor([8, 7])}):
            with pytest.raises(UnsupportedError, match="^mc_token_ids: GPT2DoubleHeadsModel would"):
                model(**inputs, **asked)
        found = model(**inputs, mc_token_ids=last).mc_logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert far > 1e-3
