"""Models of several modalities with an image in the prompt, beside themselves on their own."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach

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
