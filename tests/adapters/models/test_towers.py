"""Modules that make tokens of images and sounds keep their own attention."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from kvpolicy.adapters.hf.rule.untouched import configs_of
from kvpolicy.adapters.hf.training import attach_for_training
from kvpolicy.evaluation.look.lost_mass import LostMass, observed

GREEDY = {
    "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
IMAGE, SOUND = 150, 151  # tokens
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4, "crop_size": 16, "image_token_id": IMAGE,
}  # fmt: skip
AUDIO = {
    "hidden_size": 32, "intermediate_size": 32, "num_blocks": 3, "num_attention_heads": 2,
    "input_size": 8, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
    "nemo_conv_channels": 8, "nemo_final_size": 1, "bias_max_distance": 64,
    "audio_token_id": SOUND,
}  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_tokens(token, count):
    """Two rows of ids, of which `count` columns are an image's or a sound's."""
    ids = torch.randint(20, 60, (2, count + 9), generator=torch.Generator().manual_seed(1))
    ids[:, 4 : 4 + count] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def phi4(kind):
    """Its towers lie in its decoder, and their configs in its decoder's."""
    model = tiny_model("phi4_multimodal", vision_config=VISION, audio_config=AUDIO)
    if kind == "image":  # of two crops, 2 x 2 tokens each, and separators
        return model, with_tokens(IMAGE, 13) | {
            "image_pixel_values": draw(2, 2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16]] * 2),
            "image_attention_mask": torch.ones(2, 2, 4, 4),
        }
    heard = torch.arange(32) < torch.tensor([[32], [24]])
    return model, with_tokens(SOUND, 4) | {
        "audio_input_features": draw(2, 32, 8), "audio_attention_mask": heard,
        "audio_embed_sizes": torch.tensor([4, 4]),
    }  # fmt: skip


def kosmos():
    """A module outside its decoder reads its decoder's config."""
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 2, "patch_embed_hidden_size": 48, "max_num_patches": 16,
    }  # fmt: skip
    model = tiny_model("kosmos-2.5", vision_config=vision, latent_query_num=6)
    patches = draw(2, 12, 50)
    patches[..., :2] = torch.cartesian_prod(torch.arange(3), torch.arange(4)) + 1.0
    inputs = with_tokens(IMAGE, 6) | {"flattened_patches": patches}
    return model, inputs | {"image_embeds_position_mask": (inputs["input_ids"] == IMAGE).long()}


CASES = {
    "phi4 image": lambda: phi4("image"), "phi4 sound": lambda: phi4("sound"), "kosmos": kosmos,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_tower_that_shares_its_decoders_config(name):
    model, inputs = CASES[name]()
    pixels = next(key for key, x in inputs.items() if x.is_floating_point())
    plain = model.generate(**inputs, **GREEDY)
    other = model.generate(**{**inputs, pixels: inputs[pixels].flip(0)}, **GREEDY)
    assert (other.logits[0] - plain.logits[0]).abs().max() > 1e-2
    with torch.no_grad():
        forward = model(**inputs, labels=inputs["input_ids"])
        with attach(model, CachePipeline(window=5), page_size=4):
            ours = model.generate(**inputs, **GREEDY)
            again = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(
        torch.stack(ours.logits), torch.stack(plain.logits), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(again.logits, forward.logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(again.loss, forward.loss, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["phi4 sound", "kosmos"])
def test_beside_candidates(name):
    """The prompt's end lies within the forward that holds the image, or as long a sound."""
    model, inputs = CASES[name]()
    inputs = {key: x[:1] for key, x in inputs.items()}
    ids = inputs["input_ids"]
    ids[:, -1] = ids[:, 0]  # which lookup finds: candidates are the 3 columns after it
    if name == "phi4 sound":
        frames = ids.shape[1] + 3
        inputs |= {
            "audio_input_features": draw(1, frames, 8),
            "audio_attention_mask": torch.ones(1, frames, dtype=torch.bool),
            "audio_embed_sizes": torch.tensor([2]),
        }
        ids[:, 6:8] = 30  # of 4 tokens for sounds, two stay
    lookup = {**GREEDY, "prompt_lookup_num_tokens": 3}
    plain = model.generate(**inputs, **lookup)
    with attach(model, CachePipeline(window=5), page_size=4):
        ours = model.generate(**inputs, **lookup)
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(
        torch.stack(ours.logits), torch.stack(plain.logits), rtol=0, atol=1e-3
    )


def test_configs_inside_a_decoders_keep_their_attention():
    model, _ = phi4("image")
    model.config.vision_config._attn_implementation = "sdpa"
    before = {id(x): x._attn_implementation for x in configs_of(model)}
    assert set(before.values()) == {"eager", "sdpa"}
    with attach(model, CachePipeline()):
        named = {id(x): x._attn_implementation for x in configs_of(model)}
        assert named == {**before, id(model.config): "kvpolicy"}
    assert {id(x): x._attn_implementation for x in configs_of(model)} == before


@pytest.mark.parametrize("run", [attach_for_training, lambda x: observed(x, LostMass([], 8, 4, 8))])
def test_training_and_looks_give_towers_their_attention_back(run):
    model = tiny_model("llava")
    model.config.vision_config._attn_implementation = "sdpa"
    before = {id(x): x._attn_implementation for x in configs_of(model)}
    assert set(before.values()) == {"eager", "sdpa"}
    with run(model):
        pass
    assert {id(x): x._attn_implementation for x in configs_of(model)} == before


def test_a_module_outside_the_decoder_keeps_no_model_alive():
    model, inputs = kosmos()
    with torch.no_grad():
        plain = model(**inputs).logits
        attach(model, CachePipeline()).detach()
        assert torch.equal(model(**inputs).logits, plain)
        attach(model, CachePipeline())
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=0, atol=1e-3)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
