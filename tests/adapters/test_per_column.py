"""Arguments that say something of each column or row, where forwards are cut."""

from __future__ import annotations

import pytest
import torch
import transformers

from kvpolicy import CachePipeline, UnsupportedError
from kvpolicy.adapters.hf import attach, masks
from kvpolicy.adapters.hf.forward import parted
from kvpolicy.adapters.hf.rule.tiny import tiny_model
from tests.adapters.models.test_images import IMAGE, TEXT, sharp
from tests.support.adapters.models import SIZES, error, prompt
from tests.support.adapters.versions import NEWEST

PIPELINE = CachePipeline(window=5)
GREEDY = {
    "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
LOOKUP = {"prompt_lookup_num_tokens": 3}


def qwen():
    """Its layers add something of each image to the columns of the image."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": rope, "head_dim": 16},
        vision_config={
            "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
            "out_hidden_size": 64, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=IMAGE, video_token_id=191, vision_start_token_id=192,
        vision_end_token_id=193,
    )  # fmt: skip
    return sharp(transformers.Qwen3VLForConditionalGeneration(config))


@pytest.mark.parametrize("pad", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_what_layers_add_to_images_beside_candidates(pad):
    """The prompt's end lies within the forward that holds the image."""
    model = qwen()
    ids = torch.randint(10, 180, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 4], ids[:, 5:13], ids[:, 13] = 192, IMAGE, 193
    ids[:, 19:] = ids[:, 14:19]  # which lookup finds
    ids = torch.nn.functional.pad(ids, (pad, 0))
    inputs = {
        "input_ids": ids, "attention_mask": (ids > 0).long(),
        "mm_token_type_ids": (ids == IMAGE).int(), "image_grid_thw": torch.tensor([[1, 4, 8]]),
        "pixel_values": torch.randn(32, 1176, generator=torch.Generator().manual_seed(5)),
    }  # fmt: skip
    plain = model.generate(**inputs, **GREEDY, **LOOKUP)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    assert error(model.generate(**other, **GREEDY), model.generate(**inputs, **GREEDY)) > 1e-3
    with attach(model, PIPELINE, **SIZES):
        ours = model.generate(**inputs, **GREEDY, **LOOKUP)
    assert torch.equal(ours.sequences, plain.sequences) and error(ours, plain) < 1e-4


def test_a_forward_in_two_parts():
    """Whatever an argument is called; what is not of columns goes to both."""
    where = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0]]).bool()
    added = [torch.arange(5.0)[:, None] + 10 * n for n in range(2)]
    given = {
        "input_ids": torch.arange(12).view(2, 6), "position_ids": torch.arange(18).view(3, 1, 6),
        "per_layer_inputs": torch.randn(2, 6, 3, 4), "attention_mask": torch.ones(2, 9),
        "lang_ids": torch.ones(2), "visual_pos_masks": where, "deepstack_visual_embeds": added,
        "image_embeds": torch.arange(10.0).view(1, 5, 2), "image_embeds_position_mask": where,
        "audio_input_features": torch.ones(2, 6, 8), "pixel_values": torch.ones(2, 6, 4),
        "vision_mask": where[..., None].expand(-1, -1, 3), "deepstack_features": {4: added[0]},
    }  # fmt: skip
    first, rest = parted(given, 4)
    columns = ("input_ids", "per_layer_inputs", "visual_pos_masks", "image_embeds_position_mask")
    for name in columns:
        assert torch.equal(torch.cat([first[name], rest[name]], 1), given[name])
        assert first[name].shape[1] == 4
    assert first["position_ids"].shape == (3, 1, 4) and rest["position_ids"].shape == (3, 1, 2)
    for name in ("attention_mask", "lang_ids", "audio_input_features"):
        assert first[name] is rest[name] is given[name]
    assert first["pixel_values"] is given["pixel_values"] and rest["pixel_values"] is None
    parts = [part["deepstack_visual_embeds"][1].flatten().tolist() for part in (first, rest)]
    assert parts == [[10, 11, 13], [12, 14]]
    assert first["image_embeds"].tolist() == [[0, 1], [2, 3], [6, 7]]
    assert rest["image_embeds"].tolist() == [[4, 5], [8, 9]]
    assert first["deepstack_features"][4].flatten().tolist() == [0, 1, 3]
    assert rest["deepstack_features"][4].flatten().tolist() == [2, 4]
    assert parted({**given, "visual_pos_masks": where & (torch.arange(6) < 4),
                   "deepstack_visual_embeds": [x[:3] for x in added]}, 4)[1][
        "deepstack_visual_embeds"
    ] is None  # fmt: skip
    with pytest.raises(UnsupportedError, match="^states: not beside candidates"):
        parted({**given, "states": [torch.ones(3)]}, 4)
    with pytest.raises(UnsupportedError, match="^states: not beside candidates"):
        parted({**given, "states": {0: torch.ones(3)}}, 4)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"prefill_chunk_size": 4}, "prefill_chunk_size: not beside inputs_embeds"),
        (
            {**LOOKUP, "attention_mask": "given"},
            "attention_mask: beside inputs_embeds assisted generation",
        ),
        (
            {**LOOKUP, "input_ids": "given"},
            "inputs_embeds: not beside the ids of assisted generation",
        ),
        ({"seq_idx": torch.zeros(1, 9)}, "seq_idx: generate goes on from one text a row"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "cu_seq_lens_q: generate goes on"),
    ],
)
def test_columns_that_transformers_loops_do_not_cut(llama, more, says):
    """Embeddings are read whole in each chunk there, masks cut to the ids, bounds left as given."""
    ids = prompt([9])["input_ids"]
    stand = {"attention_mask": (torch.arange(9) > 2).long()[None], "input_ids": ids}
    more = {k: stand[k] if isinstance(x, str) else x for k, x in more.items()}
    embeds = llama.get_input_embeddings()(ids).detach()
    with attach(llama, PIPELINE) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match=f"^{says}"):
            llama.generate(inputs_embeds=embeds, past_key_values=cache, **more, **GREEDY)
        assert cache.state is None


@NEWEST
def test_embeddings_alone_beside_prompt_lookup(llama):
    embeds = llama.get_input_embeddings()(prompt([9])["input_ids"].repeat(1, 3)).detach()
    plain = llama.generate(inputs_embeds=embeds, **{**GREEDY, "max_new_tokens": 20})
    with attach(llama, PIPELINE):
        options = {**GREEDY, **LOOKUP, "max_new_tokens": 20}
        ours = llama.generate(inputs_embeds=embeds, **options)
    assert torch.equal(ours.sequences, plain.sequences)


@torch.no_grad()
def test_tokens_far_apart_that_see_each_other(monkeypatch):
    """Blocks need not be neighbours: every pair counts, or the blocks themselves where many."""
    model, ids = tiny_model("hrm_text"), prompt([10])["input_ids"] % 60
    apart = torch.zeros_like(ids)
    apart[0, [1, 7]] = 1
    causal = model(ids).logits
    assert (model(ids, token_type_ids=apart).logits - causal).abs().max() > 0.1
    with attach(model, PIPELINE):
        for pairs in (2**20, 4):
            monkeypatch.setattr(masks, "_PAIRS", pairs)
            with pytest.raises(UnsupportedError, match="^attention_mask: tokens would see later"):
                model(ids, token_type_ids=apart)
            assert (model(ids, token_type_ids=apart * 0).logits - causal).abs().max() < 1e-3


ROWS = ["position_ids", "token_type_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "chunks", "beams", "lookup", "assistant"])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["gpt2", "bert", "qwen2_vl"])
@torch.no_grad()
def test_values_of_each_row_and_column(kind, name, mode):
    """Padded on the left; in the modes that cut prompts or candidates too."""
    model, alone = tiny_model(kind), mode in ("lookup", "assistant")
    if kind == "qwen2_vl" and name == "token_type_ids":
        name = "mm_token_type_ids"
    inputs = prompt([11] if alone else [14, 9])
    ids, mask = inputs["input_ids"] % 60, inputs["attention_mask"]
    if alone:
        ids = torch.nn.functional.pad(ids.repeat(1, 2), (3, 0))
        mask = (torch.arange(25) > 2).long()[None]
    kinds = torch.randint(0, 2, ids.shape, generator=torch.Generator().manual_seed(1))
    places = (mask.cumsum(1) - 1).clamp(min=0) * 2 + torch.arange(len(ids))[:, None] * 5
    value = places if name == "position_ids" else kinds * (kind != "qwen2_vl")
    mode = {
        "whole": {}, "chunks": {"prefill_chunk_size": 4}, "beams": {"num_beams": 2},
        "lookup": LOOKUP, "assistant": {"assistant_model": tiny_model(kind, seed=1)},
    }[mode]  # fmt: skip
    options = {**GREEDY, **mode, "attention_mask": mask}
    if "prefill_chunk_size" in options and name != "position_ids":
        first = tuple(int(n) for n in transformers.__version__.split(".")[:2])
        if first < (5, 20):
            pytest.skip("its chunks do not cut kinds of tokens")
    plain = model.generate(ids, **{name: value}, **options)
    assert kind == "qwen2_vl" or error(plain, model.generate(ids, **options)) > 1e-2
    with attach(model, PIPELINE, **SIZES):
        ours = model.generate(ids, **{name: value}, **options)
    assert torch.equal(ours.sequences, plain.sequences) and error(ours, plain) < 1e-3
