"""What becomes of each argument: a value other than the default, or the sentence that refuses it.

An entry is a dict of the call's keywords. Where its name alone is no whole call, others stand
beside it; `base` holds those that the plain call without the argument has as well.
"""

from __future__ import annotations

import attrs
import torch
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.generation import CompileConfig, GenerationConfig

from tests.support.adapters.models import prompt, tiny


@attrs.frozen
class Honoured:
    """`value` changes what the plain call with `base` says, and the attached one says the same."""

    value: object
    base: dict = attrs.field(factory=dict)


@attrs.frozen
class Inert:
    """`value` changes nothing in transformers either, as this model and cache are."""

    value: object
    base: dict = attrs.field(factory=dict)


@attrs.frozen
class Refused:
    """UnsupportedError whose sentence begins with `says`, by default the name."""

    value: object
    base: dict = attrs.field(factory=dict)
    says: str = ""


@attrs.frozen
class Elsewhere:
    """Held by a test of its own, `file::function`."""

    test: str


class Last(LogitsProcessor):
    def __call__(self, ids, scores):
        return scores.flip(-1)


class Stop(StoppingCriteria):
    def __call__(self, ids, scores, **kwargs):
        return torch.full(ids.shape[:1], ids.shape[1] >= 12)


IDS = prompt([9])["input_ids"]
MORE = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(7))
ALL = {"input_ids": torch.arange(3, 150)[None]}  # so that a greedy answer repeats some
SAMPLE = {"do_sample": True}
FEW, MANY = list(range(3, 100)), list(range(100))  # tokens
TWO = {"input_ids": prompt([9, 9])["input_ids"]}
BEAMS = {"num_beams": 3}
DICT = {"return_dict_in_generate": True}
SCORED = {**DICT, **SAMPLE, "output_scores": True}
LONG = {"eos_token_id": 9, "max_new_tokens": 20}
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
GUIDED = {"guidance_scale": 1.7}

GENERATE = {
    "inputs": Honoured(MORE, {"input_ids": None, "bos_token_id": 7}),
    "input_ids": Honoured(MORE),
    "inputs_embeds": Honoured(tiny().model.embed_tokens(MORE).detach()),
    "attention_mask": Honoured(MASK),
    "position_ids": Honoured(torch.arange(9)[None] * 2),
    "past_key_values": Elsewhere("test_detached.py::test_a_cache_outlives_its_attachment"),
    "generation_config": Honoured(GenerationConfig(suppress_tokens=FEW, pad_token_id=0)),
    "logits_processor": Honoured([Last()]),
    "stopping_criteria": Honoured([Stop()]),
    "prefix_allowed_tokens_fn": Honoured(lambda batch, ids: list(range(50, 60))),
    "synced_gpus": Refused(True),
    "assistant_model": Elsewhere("test_neutral.py::test_assisted"),
    "streamer": Elsewhere("test_neutral.py::test_streamer"),
    "negative_prompt_ids": Honoured(MORE, GUIDED),
    "negative_prompt_attention_mask": Honoured(MASK, {**GUIDED, "negative_prompt_ids": MORE}),
    "custom_generate": Refused(lambda *args, **kwargs: None),
    "tokenizer": Elsewhere("test_tokenizer.py::test_stop_strings"),
    "assistant_tokenizer": Elsewhere("test_tokenizer.py::test_assistant_of_another_vocabulary"),
    "trust_remote_code": Inert(True),
}  # fmt: skip

CONFIG = {
    "assistant_confidence_threshold": Elsewhere("test_assisted.py::test_assistant_options"),
    "assistant_early_exit": Refused(1),
    "assistant_ensemble_weight": Elsewhere("test_assisted.py::test_assistant_options"),
    "assistant_lookbehind": Inert(5),
    "bad_words_ids": Honoured([[n] for n in range(3, 100)]),
    "begin_suppress_tokens": Honoured(list(range(100, 190))),
    "bos_token_id": Honoured(7, {"input_ids": None, "bos_token_id": 9}),
    "cache_config": Refused({"nbits": 4}),
    "cache_implementation": Refused("static"),
    "compile_config": Refused(CompileConfig()),
    "constraints": Refused([object()], BEAMS),
    "continuous_batching_config": Refused({"block_size": 8}),
    "decoder_start_token_id": Inert(5),
    "disable_compile": Inert(True),
    "diversity_penalty": Refused(0.5, {**BEAMS, "num_beam_groups": 3}, says="num_beam_groups"),
    "do_sample": Honoured(True),
    "dola_layers": Refused("low"),
    "early_stopping": Inert(True, BEAMS),
    "encoder_no_repeat_ngram_size": Honoured(1, ALL),
    "encoder_repetition_penalty": Honoured(0.2, ALL),
    "eos_token_id": Honoured(MANY, {"max_new_tokens": 20}),
    "epsilon_cutoff": Honoured(0.02, SAMPLE),
    "eta_cutoff": Honoured(0.1, SAMPLE),
    "exponential_decay_length_penalty": Honoured((1, 8.0), LONG),
    "force_words_ids": Refused([[5]], BEAMS),
    "forced_bos_token_id": Honoured(5, {"input_ids": IDS[:, :1]}),
    "forced_eos_token_id": Honoured(5),
    "guidance_scale": Honoured(1.7),
    "is_assistant": Refused(True),
    "length_penalty": Honoured(-3.0, {**BEAMS, "eos_token_id": MANY}),
    "low_memory": Inert(True),
    "max_cache_len": Refused(64),
    "max_length": Honoured(12, {"max_new_tokens": None, "max_length": 20}),
    "max_matching_ngram_size": Elsewhere("test_assisted.py::test_lookup_options"),
    "max_new_tokens": Honoured(2),
    "max_time": Honoured(1e-9),
    "min_length": Honoured(14, {"eos_token_id": list(range(190))}),
    "min_new_tokens": Honoured(4, {"eos_token_id": list(range(190))}),
    "min_p": Honoured(0.3, SAMPLE),
    "no_repeat_ngram_size": Honoured(1, ALL),
    "num_assistant_tokens": Elsewhere("test_assisted.py::test_assistant_options"),
    "num_assistant_tokens_schedule": Elsewhere("test_assisted.py::test_assistant_options"),
    "num_beam_groups": Refused(3, BEAMS),
    "num_beams": Honoured(3),
    "num_return_sequences": Honoured(3, SAMPLE),
    "output_attentions": Refused(True, DICT),
    "output_hidden_states": Honoured(True, DICT),
    "output_logits": Honoured(True, DICT),
    "output_scores": Honoured(True, DICT),
    "pad_token_id": Honoured(5, {**TWO, "eos_token_id": MANY, "max_new_tokens": 20}),
    "penalty_alpha": Refused(0.6),
    "prefill_chunk_size": Elsewhere("test_neutral.py::test_tokens"),
    "prompt_lookup_num_tokens": Elsewhere("test_neutral.py::test_assisted"),
    "remove_invalid_values": Inert(True),
    "renormalize_logits": Honoured(True, {**SCORED, "temperature": 0.5}),
    "repetition_penalty": Honoured(9.0, ALL),
    "return_dict_in_generate": Honoured(True),
    "sequence_bias": Honoured([[[9], 50.0]]),
    "speculation_type": Refused("dflash"),
    "stop_strings": Elsewhere("test_tokenizer.py::test_stop_strings"),
    "suppress_tokens": Honoured(FEW),
    "target_lookbehind": Inert(5),
    "temperature": Honoured(0.05, SAMPLE),
    "token_healing": Elsewhere("test_tokenizer.py::test_token_healing"),
    "top_h": Honoured(0.2, SAMPLE),
    "top_k": Honoured(1, SAMPLE),
    "top_p": Honoured(0.1, SAMPLE),
    "transformers_version": Inert("5.0.0"),
    "typical_p": Honoured(0.1, SAMPLE),
    "use_cache": Refused(False, says="use_cache=False"),
    "use_mtp": Refused(True),
    "watermarking_config": Honoured(WatermarkingConfig(bias=30.0)),
}  # fmt: skip

# Of the forward of a causal language model, its decoder's included.
FORWARD = {
    "input_ids": Honoured(MORE),
    "attention_mask": Honoured(MASK),
    "position_ids": Honoured(torch.arange(9)[None] * 2),
    "past_key_values": Elsewhere("test_detached.py::test_a_cache_outlives_its_attachment"),
    "inputs_embeds": Honoured(tiny().model.embed_tokens(MORE).detach()),
    "labels": Honoured(IDS),
    "use_cache": Honoured(False),
    "logits_to_keep": Honoured(1),
    "num_items_in_batch": Honoured(torch.tensor(3), {"labels": IDS}),
    "output_hidden_states": Honoured(True),
    "output_attentions": Refused(True),
    "output_router_logits": Inert(True),
    "return_dict": Honoured(False),
    "cu_seq_lens_q": Elsewhere("test_packed.py::test_bounds"),
    "cu_seq_lens_k": Elsewhere("test_packed.py::test_bounds"),
    "max_length_q": Elsewhere("test_packed.py::test_bounds"),
    "max_length_k": Elsewhere("test_packed.py::test_bounds"),
    "seq_idx": Elsewhere("test_packed.py::test_bounds"),
    "is_causal": Refused(False, says="is_causal=False"),
}

# Of forwards of the other served causal types.
# What goes into towers reaches the decoder as embeddings and positions.
IMAGES = Elsewhere("models/test_images.py::test_positions_after_an_image_are_the_models")
OTHER_FORWARDS = {
    "encoder_hidden_states": Elsewhere("test_honoured.py::test_cross_attention"),
    "encoder_outputs": Elsewhere("test_honoured.py::test_cross_attention"),
    "encoder_attention_mask": Elsewhere("test_honoured.py::test_inputs_of_other_forwards"),
    "return_shared_kv_states": Elsewhere(
        "test_honoured.py::test_keys_and_values_of_shared_layers"
    ),
    "token_type_ids": Elsewhere("test_own_steps.py::test_kinds_of_tokens"),
    "lang_ids": Elsewhere("test_own_steps.py::test_the_language_of_every_step"),
    "task_type_ids": Elsewhere("test_honoured.py::test_inputs_of_other_forwards"),
    "input_shape_ids": Elsewhere("test_honoured.py::test_inputs_of_other_forwards"),
    "input_pronunciation_ids": Elsewhere("test_honoured.py::test_inputs_of_other_forwards"),
    "per_layer_inputs": Elsewhere("test_honoured.py::test_inputs_of_layers"),
    "mm_token_type_ids": Elsewhere(
        "models/test_images.py::test_tokens_of_an_image_that_see_each_other_are_refused"
    ),
    **{
        name: IMAGES
        for name in (
            "pixel_values", "pixel_values_videos", "image_patches", "image_pixel_values",
            "image_attention_mask", "image_position_ids", "image_sizes", "mm_encoder_outputs",
            "num_frames_per_video", "video_position_ids", "audio_attention_mask",
            "audio_embed_sizes", "audio_input_features", "input_features", "input_features_mask",
            "padding_mask",  # of audio
        )
    },
}  # fmt: skip

# Of attention functions, beside query, key and value.
ATTENTION = {
    "attention_mask": Elsewhere("test_attach.py::test_refused_by_forward"),
    "dropout": Refused(0.1),
    "scaling": Refused(0.5),
    "sliding_window": Elsewhere("test_neutral.py::test_tokens"),
    "is_causal": Refused(False, says="is_causal=False"),
    "softcap": Refused(30.0),
    "s_aux": Refused(torch.zeros(4)),
    "position_bias": Refused(torch.zeros(1)),
    "head_mask": Refused(torch.zeros(1)),
    "cache": Refused(object()),
}
