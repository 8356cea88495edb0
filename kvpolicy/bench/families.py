"""Model types in use, cut in depth to one or two periods of their kinds of layers."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from .context import Bench

# Of a model that is compared. All experts are chosen: which of some are, rounding may decide.
VOCAB, EXPERTS, INNER = 4096, 4, 1024


@attrs.frozen(kw_only=True)
class Family:
    """A published shape.

    Attributes:
        type: transformers' `model_type`.
        layers: decoder layers that are kept, a whole number of periods.
        sizes: fields of its config.
        inner: names of the fields that hold widths of its feed-forward layers.
        prompt: tokens of a chunk of a plain prompt, as many as its torch code has memory for.
    """

    type: str
    layers: int
    sizes: dict[str, Any]
    inner: tuple[str, ...] = ("intermediate_size",)
    prompt: int = 2048


def _every(period: int, kind: str, layers: int) -> list[str]:
    """`kind` but for the last layer of each period, which sees all keys."""
    return ["full_attention" if n % period == period - 1 else kind for n in range(layers)]


_YARN = dict(rope_type="yarn", rope_theta=150000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0,
             truncate=False, original_max_position_embeddings=4096)  # fmt: skip
_MAMBA = ["mamba"] * 5 + ["attention"] + ["mamba"] * 4

FAMILIES = {
    "gpt-oss": Family(
        type="gpt_oss", layers=4, prompt=512,
        sizes=dict(
            vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
            num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
            sliding_window=128, rope_parameters=_YARN,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "Gemma 3": Family(
        type="gemma3_text", layers=6,
        sizes=dict(
            vocab_size=262208, hidden_size=3840, intermediate_size=15360, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256, sliding_window=1024, query_pre_attn_scalar=256,
            layer_types=_every(6, "sliding_attention", 6),
        ),
    ),
    "Gemma 2": Family(
        type="gemma2", layers=4, prompt=512,
        sizes=dict(
            vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
            num_key_value_heads=8, head_dim=256, sliding_window=4096, query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
    "Qwen3-MoE": Family(
        type="qwen3_moe", layers=4, inner=("intermediate_size", "moe_intermediate_size"),
        sizes=dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True,
        ),
    ),
    "Qwen3.5": Family(
        type="qwen3_5_text", layers=8,
        sizes=dict(
            vocab_size=248320, hidden_size=4096, intermediate_size=12288, num_attention_heads=16,
            num_key_value_heads=4, head_dim=256, layer_types=_every(4, "linear_attention", 8),
        ),
    ),
    "Granite 4": Family(
        type="granitemoehybrid", layers=10, prompt=1024,
        inner=("intermediate_size", "shared_intermediate_size"),
        sizes=dict(
            vocab_size=100352, hidden_size=1536, intermediate_size=512, num_attention_heads=12,
            num_key_value_heads=4, num_local_experts=64, num_experts_per_tok=6,
            shared_intermediate_size=1024, attention_multiplier=0.0078125, embedding_multiplier=12,
            residual_multiplier=0.22, logits_scaling=6, mamba_n_heads=48, mamba_d_head=64,
            mamba_d_state=128, mamba_n_groups=1, position_embedding_type="nope",
            mamba_chunk_size=64,  # published: 256, for which its torch code has no memory
            layer_types=_MAMBA,
        ),
    ),
    "Llama 4": Family(
        type="llama4_text", layers=4, inner=("intermediate_size", "intermediate_size_mlp"),
        sizes=dict(
            vocab_size=202048, hidden_size=5120, intermediate_size=8192,
            intermediate_size_mlp=16384, num_attention_heads=40, num_key_value_heads=8,
            head_dim=128, num_local_experts=16, attention_chunk_size=8192,
            layer_types=_every(4, "chunked_attention", 4),
        ),
    ),
    "SmolLM3": Family(
        type="smollm3", layers=4,
        sizes=dict(
            vocab_size=128256, hidden_size=2048, intermediate_size=11008, num_attention_heads=16,
            num_key_value_heads=4,
        ),
    ),
    "Phi-4": Family(
        type="phi3", layers=4,
        sizes=dict(
            vocab_size=100352, hidden_size=5120, intermediate_size=17920, num_attention_heads=40,
            num_key_value_heads=10,
        ),
    ),
    "GLM-4": Family(
        type="glm4", layers=4,
        sizes=dict(
            vocab_size=151552, hidden_size=4096, intermediate_size=13696, num_attention_heads=32,
            num_key_value_heads=2, head_dim=128, attention_bias=False,
        ),
    ),
    "OLMo 3": Family(
        type="olmo3", layers=4,
        sizes=dict(
            vocab_size=100278, hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
            num_key_value_heads=32, sliding_window=4096,
            layer_types=_every(4, "sliding_attention", 4),
        ),
    ),
}  # fmt: skip


def config_of(bench: Bench, name: str, *, narrow: bool) -> Any:
    """The config of a family; `narrow` in all that attention does not see."""
    from transformers import CONFIG_MAPPING

    from ..adapters.hf.rule.tiny import tiny_config

    family = FAMILIES[name]
    ids: dict[str, Any] = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    experts = [n for n in family.sizes if n in ("num_experts", "num_local_experts")]
    sizes = dict(family.sizes)
    if narrow:
        few: dict[str, Any] = {
            "vocab_size": VOCAB,
            "num_experts_per_tok": EXPERTS,
            **dict.fromkeys(experts, EXPERTS),
        }
        few |= dict.fromkeys(family.inner, INNER)
        sizes |= {field: size for field, size in few.items() if field in sizes or experts}
    if bench.quick:
        chosen = {"num_experts_per_tok": EXPERTS} if narrow and experts else {}
        return tiny_config(family.type, **ids, **chosen)
    made: Any = CONFIG_MAPPING[family.type]
    return made(num_hidden_layers=family.layers, max_position_embeddings=1 << 17, **sizes, **ids)


def build(bench: Bench, name: str, *, narrow: bool = False, attention: str | None = None) -> Any:
    """The model with random weights, on the device in bfloat16."""
    return built(bench, config_of(bench, name, narrow=narrow), attention)


def built(bench: Bench, config: Any, attention: str | None = None) -> Any:
    """A causal language model of `config`, on the device in bfloat16."""
    from ..adapters.hf.rule.tiny import class_of

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            given = {} if attention is None else {"attn_implementation": attention}
            model = class_of(config.model_type)._from_config(config, **given).eval()
    finally:
        torch.set_default_dtype(before)
    _peaked(model)
    return model


@torch.no_grad()
def _peaked(model: Any) -> None:
    """Makes scores spread over a few units, and sinks as heavy as some keys."""
    for name, weight in model.named_parameters():
        path = name.split(".")
        if any(part in ("q_proj", "k_proj", "qkv_proj") for part in path) and weight.ndim == 2:
            weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
        elif path[-1] == "sinks":
            weight.normal_(mean=6.0)
