"""Read a Llama or Qwen2 model out of a GGUF file: config, weights and tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from ..._extras import extra

if TYPE_CHECKING:
    from gguf import GGUFReader

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_CONTROL_TOKEN, _USER_DEFINED = 3, 4  # GGUF token types; <|im_start|> is of the first
_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
# How Qwen2 cuts text into words (transformers, `models/qwen2/tokenization_qwen2.py`).
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def open_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file.

    Raises:
        ImportError: the `gguf` package is missing.
    """
    with extra("eval"):
        from gguf import GGUFReader
    return GGUFReader(path)


def read_config(reader: GGUFReader) -> PreTrainedConfig:
    """The model's shape as transformers names it.

    Raises:
        ValueError: an architecture that is not known here.
    """
    kind = _field(reader, "general.architecture")
    if kind not in _CONFIGS:
        raise ValueError(f"architecture: wanted one of {', '.join(_CONFIGS)}, got {kind!r}")
    return _CONFIGS[kind](
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=_field(reader, f"{kind}.embedding_length"),
        intermediate_size=_field(reader, f"{kind}.feed_forward_length"),
        num_hidden_layers=_field(reader, f"{kind}.block_count"),
        num_attention_heads=_field(reader, f"{kind}.attention.head_count"),
        num_key_value_heads=_field(reader, f"{kind}.attention.head_count_kv"),
        max_position_embeddings=_field(reader, f"{kind}.context_length"),
        rms_norm_eps=_field(reader, f"{kind}.attention.layer_norm_rms_epsilon"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _field(reader, f"{kind}.rope.freq_base"),
        },
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )


def read_weights(reader: GGUFReader, dtype: torch.dtype) -> dict[str, Tensor]:
    """Dequantized weights under transformers' names, cast to `dtype`."""
    with extra("eval"):
        from gguf import dequantize

    heads = {}
    if _field(reader, "general.architecture") == "llama":  # the one whose rows are interleaved
        heads = {
            "attn_q": _field(reader, "llama.attention.head_count"),
            "attn_k": _field(reader, "llama.attention.head_count_kv"),
        }
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        kind = tensor.name.removesuffix(".weight").split(".")[-1]
        if kind in heads:
            weight = _split_halves(weight, heads[kind])
        weights[_weight_name(tensor.name)] = weight.to(dtype).contiguous()
    return weights


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer with its chat template.

    Raises:
        ValueError: a tokenizer that is not known here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as before

    model, kind = (_field(reader, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    parts = {
        "smollm": lambda: before.Digits(individual_digits=True),
        "qwen2": lambda: before.Split(Regex(_QWEN_WORDS), behavior="isolated"),
    }
    if model != "gpt2" or kind not in parts:
        raise ValueError(
            f"tokenizer model and pre-tokenizer: wanted gpt2 and one of {', '.join(parts)}, got "
            f"{model!r} and {kind!r}"
        )
    tokens = _field(reader, "tokenizer.ggml.tokens")
    types = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]

    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    if kind == "qwen2":
        bpe.normalizer = normalizers.NFC()
    # What the split left whole stays so.
    bytewise = before.ByteLevel(add_prefix_space=False, use_regex=kind != "qwen2")
    bpe.pre_tokenizer = before.Sequence([parts[kind](), bytewise])
    bpe.decoder = decoders.ByteLevel()
    found = list(zip(tokens, types, strict=True))
    plain = [AddedToken(x, special=False, normalized=False) for x, t in found if t == _USER_DEFINED]
    bpe.add_tokens(plain)
    control = [t for t, kind in found if kind == _CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def named(name: str) -> str | None:
        field = reader.get_field(f"tokenizer.ggml.{name}_token_id")
        return None if field is None else str(tokens[field.contents()])

    starts = reader.get_field("tokenizer.ggml.add_bos_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=named("bos") if starts is None or starts.contents() or kind == "smollm" else None,
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=_field(reader, f"{_field(reader, 'general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"GGUF field {name!r} is missing")
    return field.contents()


def _weight_name(name: str) -> str:
    *parts, kind = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{kind}"
    return f"{_TOP_NAMES[parts[0]]}.{kind}"


def _split_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo GGUF's interleave of rotary pairs: rows `[a0, b0, a1, b1, ...]` to `[a..., b...]`."""
    rows, columns = weight.shape
    paired = weight.view(heads, rows // heads // 2, 2, columns)
    return paired.transpose(1, 2).reshape(rows, columns)
