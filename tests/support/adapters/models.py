"""Tiny random models of each family, prompts, and policies that act on short ones."""

from __future__ import annotations

import attrs
import torch
import transformers

from kvpolicy import Admission, CachePipeline, Quest, RandomGate, SnapKV, WriteGate

KINDS = ("llama", "mistral", "qwen2", "qwen2-sliding", "qwen3")
_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_EXTRA = {
    "mistral": {"sliding_window": 6},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}
SIZES = {"page_size": 4, "interval": 8}


def tiny(kind="llama", seed=0, eos=None, layers=2, **extra):
    name = _CLASSES[kind.split("-")[0]]
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
            "bos_token_id": None, "eos_token_id": eos, "pad_token_id": 0,
            **_EXTRA.get(kind, {}), **extra,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def prompt(lengths, side="left", seed=1):
    """Ids and mask `[B, S]` of random prompts, padded to the longest."""
    rng, width = torch.Generator().manual_seed(seed), max(lengths)
    ids = torch.randint(3, 200, (len(lengths), width), generator=rng)
    mask = torch.ones_like(ids)
    for row, n in enumerate(lengths):
        pad = slice(0, width - n) if side == "left" else slice(n, width)
        ids[row, pad], mask[row, pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@attrs.frozen(kw_only=True)
class Striped(Admission):
    """Admits by position and head: a different share for each head."""

    window: int | None = None

    def admit(self, write):
        heads = (
            torch.tensor(list(write.heads), device=write.positions.device)[:, None] + write.layer
        )
        return (write.positions * 7 + heads * 3) % 5 < 1 + heads


def gate(layers=2, heads=2, dim=16, width=8, window=5):
    rng = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    return WriteGate(
        norm_pre=1 + 0.1 * normal(layers, dim), norm_post=1 + 0.1 * normal(layers, dim),
        w1=normal(layers, heads, width, 2 * dim), b1=normal(layers, heads, width),
        w2=normal(layers, heads, width), b2=normal(layers, heads), threshold=0.5, window=window,
    )  # fmt: skip


def pipelines():
    some = RandomGate(sparsity=0.5)
    few, late = SnapKV(budget=14, observation=4), SnapKV(budget=14, observation=4, when="decode")
    return {
        "striped": CachePipeline(admission=Striped(), window=5),
        "gate": CachePipeline(admission=gate()),
        "quest": CachePipeline(selection=Quest(budget=13), window=5),
        "snapkv": CachePipeline(eviction=few, window=5),
        "all": CachePipeline(admission=some, selection=Quest(budget=9), eviction=late, window=5),
        "gate-quest-snapkv": CachePipeline(
            admission=gate(), selection=Quest(budget=9, group="each"), eviction=few
        ),
    }


def error(a, b):
    """The largest difference between the logits of two outputs of generate."""
    return max(float((x - y).abs().max()) for x, y in zip(a.logits, b.logits, strict=True))
