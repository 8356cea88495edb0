"""Models of several modalities with an image in the prompt, beside themselves on their own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.continuations import continued

GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TEXT = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
IMAGE = 190  # token


def sharp(model):
    """Peaked attention, so that a wrong position changes what is said."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
    return model.eval()


def prompt(rows):
    """Ids with 8 image tokens, and their kinds."""
    ids = torch.randint(10, 180, (rows, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 4], ids[:, 5:13], ids[:, 13] = 192, IMAGE, 193
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def qwen():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={
            "depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        },
        image_token_id=IMAGE, video_token_id=191, vision_start_token_id=192,
        vision_end_token_id=193,
    )  # fmt: skip
    return sharp(transformers.Qwen2VLForConditionalGeneration(config))


def pictured(rows):
    inputs = prompt(rows)
    return inputs | {
        "pixel_values": torch.randn(32 * rows, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 8]] * rows),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
    }


@pytest.mark.parametrize("rows", [1, 2])
def test_positions_after_an_image_are_the_models(rows):
    model, inputs = qwen(), pictured(rows)
    plain = model.generate(**inputs, **GREEDY)
    assert int(model.model.rope_deltas[0]) != 0  # what counting tokens would miss
    with attach(model, CachePipeline(window=5), page_size=4):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)


@torch.no_grad()
def test_attaching_after_a_batch_with_images():
    """What the model keeps of its positions is of two rows, for the steps that go on from there."""
    model, inputs = qwen(), pictured(2)
    model.config.rope_theta = 10001  # so that nothing is known of the configuration
    plain = model.generate(**inputs, **GREEDY)
    model(**inputs)
    kept = model.model.rope_deltas
    with attach(model, CachePipeline(window=5), page_size=4):
        assert model.model.rope_deltas is kept and len(kept) == 2
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)


@torch.no_grad()
def test_texts_after_an_image_of_another_call():
    """What the model keeps of that image's positions is no part of a context that was read."""
    model, inputs, text = qwen(), pictured(1), prompt(1)["input_ids"] % 180
    options = {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True}
    with attach(model, CachePipeline(window=5), page_size=4) as attached:
        found = []
        for before in (lambda: None, lambda: model(**inputs)):
            before()
            cache = attached.read(text[:, :14])
            before()
            said = [
                attached.loglikelihood(text[:, :14], text[:, 14:]),
                *attached.ask(cache, text[:, 14:], output_logits=True, **options).logits,
                model(text[:, 14:], past_key_values=cache).logits,
            ]
            before()
            rows = [((20,), (*range(30, 90),) * 3)]  # of more columns than one forward
            found.append([*said, continued(attached, rows)[0].chosen])
        model(**inputs)
        assert int(model.model.rope_deltas) != 0  # which a text would have gone on from
    for plain, after in zip(*found, strict=True):
        torch.testing.assert_close(after, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_conversations_with_images_that_alternate(rows):
    """Each goes on from its own images: by generate, in a loop, and on copies of its cache."""
    model, inputs = qwen(), pictured(rows)
    options = {**GREEDY, "max_new_tokens": 4}
    turn = torch.randint(10, 180, (rows, 5), generator=torch.Generator().manual_seed(3))
    token = turn[:, :1]

    def talk(cache, between, copied):
        ids = model.generate(**inputs, **{**options, "max_new_tokens": 1}, past_key_values=cache)
        between()
        ids = torch.cat([ids, turn], 1)
        mask = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        between()
        other = copied(cache)
        model(ids[:, -1:], past_key_values=other)
        between()
        last = model(token, past_key_values=other).logits
        looped = model(**inputs).past_key_values
        between()
        return ids, last, model(token, past_key_values=looped).logits

    plain = talk(transformers.DynamicCache(config=model.config.text_config), int, copy.deepcopy)
    with attach(model, CachePipeline(window=5), page_size=4) as attached:

        def between():
            model.generate(prompt(1)["input_ids"] % 180, **options)

        found = talk(attached.new_cache(), between, lambda cache: cache.fork())
        assert torch.equal(found[0], plain[0])
        for one, two in zip(found[1:], plain[1:], strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_tokens_of_an_image_that_see_each_other_are_refused():
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT | {"head_dim": 16, "sliding_window": 6},
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=192, eoi_token_index=193,
    )  # fmt: skip
    model, inputs = sharp(transformers.Gemma3ForConditionalGeneration(config)), prompt(1)
    text = {"input_ids": inputs["input_ids"] % 180, "attention_mask": inputs["attention_mask"]}
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    inputs["pixel_values"] = torch.randn(2, 3, 28, 28)
    plain = model.generate(**text, **GREEDY)
    with attach(model, CachePipeline(window=5), page_size=4):
        with pytest.raises(UnsupportedError, match="tokens would see later ones"):
            model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**text, **GREEDY), plain)
