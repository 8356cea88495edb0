"""A tiny random model and a tokenizer, for examples and tests that need no particular weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_llama(*, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A random fp32 Llama with 4 query and 2 KV heads of 32 channels and a vocabulary of 512.

    The global random state stays as it was.
    """
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character of Latin 1, with a chat template, for models of `tiny_llama`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = Tokenizer(models.WordLevel({chr(n): n for n in range(256)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        unk_token="?",
        pad_token=chr(0),
        bos_token=chr(2),
        chat_template="{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        clean_up_tokenization_spaces=False,
    )
