"""A tokenizer for the tiny models."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def letters():
    """Letters, and pairs of them; 199 tokens."""
    single = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    pairs = [(a, b) for a in single for b in single][:170]
    words = ["<pad>", "<s>", "<unk>", *single, *("".join(pair) for pair in pairs)]
    inner = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, pairs))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )
