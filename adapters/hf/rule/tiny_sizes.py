"""Sizes of tiny models: by the names that configs use, and what single types need besides."""

from __future__ import annotations

from typing import Any

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 8, 4, 2, 16, 64, 96, 160
WINDOW, CHUNK, SOFTCAP, SCALE = 5, 5, 2.0, 0.4

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# Where a config has the field and it is neither zero, None nor a list.
SIZES: dict[str, Any] = {
    **_all(
        "hidden_size n_embd d_model dim emb_dim embedding_size embed_dim conv_dim block_dim", HIDDEN
    ),
    **_all("lru_width output_hidden_size pronunciation_embed_dim shape_embed_dim", HIDDEN),
    **_all("out_hidden_size text_hidden_size", HIDDEN),  # of a tower, as wide as the text
    **_all("num_hidden_layers n_layer n_layers num_layers num_global_layers", LAYERS),
    **_all("encoder_layers vision_layers depth num_blocks conf_num_hidden_layers", 2),
    **_all("decoder_layers", 4),
    **_all("num_attention_heads n_head n_heads num_heads decoder_attention_heads", HEADS),
    **_all("encoder_attention_heads attention_heads decoder_ffn_heads conf_num_heads", HEADS),
    **_all("num_key_value_heads num_kv_heads kv_n_heads", KV_HEADS),
    **_all("head_dim kv_channels v_head_dim", HEAD_DIM),
    **_all("intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner", INNER),
    **_all("ffn_hidden_size intermediate_size_mlp dense_intermediate_size block_ff_dim", INNER),
    **_all("dim_ff dff d_inner feed_forward_size shared_experts_intermediate_size", INNER),
    **_all("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 32),
    **_all("moe_shared_expert_intermediate_size shared_intermediate_size", 32),
    **_all("vocab_size vocab_size_per_layer_input ngram_vocab_size_base", VOCAB),
    **_all("max_position_embeddings n_positions context_length", 512),
    **dict.fromkeys(EXPERTS, 4),
    **_all("n_shared_experts n_group topk_group num_expert_group", 1),
    **dict.fromkeys(CHOSEN, 2),
    **_all("first_k_dense_replace", 1),
    **_all("q_lora_rank kv_lora_rank", 32),
    **_all("qk_rope_head_dim", 8),
    **_all("qk_nope_head_dim o_lora_rank index_head_dim", 16),
    **_all("index_n_heads", 2),
    **_all("index_topk", 4),
    "index_kpool": 2,  # which divides the number above
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 150,
    "image_token_index": 150,
    "audio_token_id": 151,
    "video_token_id": 152,
    "boi_token_id": 3,
    "eoi_token_id": 4,
    "boa_token_id": 5,
    "eoa_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
    **_all("mamba_d_state ssm_state_size state_size", 8),
    **_all("mamba_n_heads mamba_num_heads", 8),
    **_all("mamba_d_head mamba_head_dim", 16),
    **_all("mamba_n_groups n_groups", 1),
    **_all("mamba_d_conv mamba_chunk_size chunk_size", 4),
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    **_all("linear_key_head_dim linear_value_head_dim", 8),
    **_all("hidden_size_per_layer_input laurel_rank", 8),
    **_all("sliding_window attention_window_size window_size", WINDOW),
    "attention_chunk_size": CHUNK,
    **_all("attn_logit_softcapping", SOFTCAP),
    "attention_multiplier": SCALE,
    "query_pre_attn_scalar": 64,
    "initializer_range": 0.3,
    **_all("attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout", 0.0),
    **_all("hidden_dropout_prob attention_probs_dropout_prob activation_dropout", 0.0),
    **_all("resid_dropout embedding_dropout attn_dropout residual_dropout", 0.0),
}
# Fields that are None by default, although models compute with them.
WANTED = (
    *("head_dim", "num_key_value_heads", "n_shared_experts", "moe_intermediate_size"),
    *EXPERTS,
    *CHOSEN,
)
# What may be narrow where attention is to stay as it is.
INNER_SIZES = {name: size for name, size in SIZES.items() if size in (INNER, 32)}

_ALTERNATING = ["sliding_attention", "full_attention"] * 4
_BART = dict.fromkeys(("encoder_layers", "decoder_layers"), 4)
_SHARING: dict[str, Any] = {"num_kv_shared_layers": 4, "layer_types": _ALTERNATING}
_GEMMA4: dict[str, Any] = {**_SHARING, "global_head_dim": 32, "num_global_key_value_heads": 1}
_NO_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}


def _axes(*section: int) -> dict[str, Any]:
    """RoPE of several axes, whose channels fill half a head."""
    return {"rope_parameters": {**_ROPE, "mrope_section": list(section)}}


_AXES = _axes(4, 2, 2)
_STAGES = {"patch_sizes": [4, 4], "hidden_sizes": [16, 32], "depths": [1, 1]}
# Of timm, which needs an image size that its patches divide.
_PERCEPTION: dict[str, Any] = {
    "architecture": "vit_pe_core_large_patch14_336",
    "model_args": {"embed_dim": HIDDEN, "depth": 2, "num_heads": HEADS, "img_size": [28, 28]},
}
_DENSE_AND_SPARSE = [*["dense"] * 4, *["sparse"] * 4]

SPECIAL: dict[str, dict[str, Any]] = {
    **_all("bart marian mbart mvp pegasus plbart whisper blenderbot blenderbot-small", _BART),
    "bigbird_pegasus": _BART,
    "bamba": {"attn_layer_indices": [3, 7], "attn_rotary_emb": 8},
    "chameleon": {"vocabulary_map": {"<image>": 150}},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
    },
    **_all("qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text glm4v_text glm_ocr_text", _AXES),
    "paddleocr_vl_text": _AXES,
    "glm4v_moe_text": {
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    },
    "ernie4_5_vl_moe_text": {**_axes(3, 3, 2), "moe_intermediate_size": [32, 32]},
    "hunyuan_vl_text": _axes(2, 2, 2, 2),
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 1.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": _DENSE_AND_SPARSE},
    "blt": {"encoder_hash_byte_group_vocab": 128},
    "gemma3n_text": {
        **_SHARING,
        "intermediate_size": [INNER] * 8,
        "activation_sparsity_pattern": [0.0] * 8,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": {k: v for k, v in _GEMMA4.items() if k != "num_global_key_value_heads"},
    "gemma4_assistant": {"text_config": {**_NO_INPUTS, "num_kv_shared_layers": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "gptj": {"rotary_dim": 8},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-1, 2]], "downsample_rate": "2/4"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 4},
    "inkling_vision": {"patch_size": 4},  # folded by its prime factors
    "lfm2": {"layer_types": ["conv", "full_attention"] * 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4, "num_dense_layers": 1},
    "longcat_flash": {
        "num_layers": 4,
        "num_hidden_layers": 8,
        "zero_expert_num": 2,
        "head_dim": 8,
        "qk_head_dim": 24,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mimo_v2_flash": {"v_head_dim": 8, "swa_v_head_dim": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 4},
    "ministral": {"layer_types": _ALTERNATING},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "moshi": {"sliding_window": 64},
    **_all("muse_glimmer muse_spark", {"out_hidden_size": 4 * HIDDEN}),  # patches, merged by four
    "muse_spark_audio": {**_STAGES, "num_hidden_layers": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "perception_lm": {"vision_config": _PERCEPTION},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_count": 2,
        "hc_lowrank": 8,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * 4,
        "axial_pos_embds": False,
        "num_buckets": 2,
    },
    "xlstm": {"chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba2": {
        "layers_block_type": [*["mamba"] * 2, "hybrid", "mamba"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Where a type's default config is none: what it needs first.
DEFAULT: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": _NO_INPUTS},
}
