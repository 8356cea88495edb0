"""A GGUF file written by hand gives the model and the tokenizer that it was written from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from kvpolicy.evaluation.models import gguf_file, qwen_coder  # noqa: E402
from kvpolicy.evaluation.models.built import Built  # noqa: E402

NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def named(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp stores rows of queries and keys of a Llama."""
    rows = [
        weight[h * 16 + half * 8 + i] for h in range(heads) for i in range(8) for half in (0, 1)
    ]
    return torch.stack(rows)


def model_of(kind: str):
    sizes = dict(
        vocab_size=262, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=False)
    model = transformers.Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:  # they start at 0, where a lost bias would not show
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(part.bias)
    return model


def written(path: Path, kind: str, model) -> Path:
    config = model.config
    out = gguf.GGUFWriter(path, kind)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "he", "ll", "<|end|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm" if kind == "llama" else "qwen2")
    out.add_token_list(tokens)
    out.add_token_types([1] * 258 + [3, 3, 3, 4])
    out.add_token_merges(["h e", "l l"])
    out.add_bos_token_id(258)
    out.add_eos_token_id(260)
    out.add_pad_token_id(258)
    out.add_chat_template(TEMPLATE)
    if kind == "qwen2":
        out.add_add_bos_token(False)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if kind == "llama" and "q_proj" in name:
            weight = interleaved(weight, 4)
        if kind == "llama" and "k_proj" in name:
            weight = interleaved(weight, 2)
        out.add_tensor(named(name), weight.numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_file_gives_the_model_it_was_written_from(tmp_path, monkeypatch, kind):
    model = model_of(kind)
    path = written(tmp_path / "model.gguf", kind, model)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = Built(
        name="tiny", architecture=type(model).__name__, bytes=path.stat().st_size, sha256=digest,
        find=lambda: path,
    )  # fmt: skip
    found, tokenizer = built.load(torch.float32, "cpu")
    assert type(found) is type(model)
    ids = torch.randint(0, 262, (1, 40))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, model(ids).logits)
    text = "hello,  tell  12345\n\n don't <|im_start|><tool>é"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    pieces = tokenizer.tokenize(text)
    assert pieces[:2] == ["he", "ll"] and {"1", "2", "3", "<|im_start|>", "<tool>"} <= set(pieces)
    assert (tokenizer.bos_token is None) == (
        kind == "qwen2"
    ) and tokenizer.eos_token == "<|im_end|>"
    # The second time the folder serves, without the file.
    path.unlink()
    again, _ = built.load(torch.float32, "cpu")
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)


def test_another_file_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path / "model.gguf", "qwen2", model_of("qwen2"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(qwen_coder.ENVIRONMENT, str(path))
    with pytest.raises(ValueError, match="want 491400064"):
        qwen_coder.load_qwen_coder(torch.float32)
    monkeypatch.setenv(qwen_coder.ENVIRONMENT, str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=qwen_coder.ENVIRONMENT):
        qwen_coder.load_qwen_coder(torch.float32)
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.close()
    with pytest.raises(ValueError, match="architecture: wanted one of llama, qwen2"):
        gguf_file.read_config(gguf_file.open_gguf(tmp_path / "other.gguf"))
