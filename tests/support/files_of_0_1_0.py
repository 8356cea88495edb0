"""What the files in tests/data/v010, which version 0.1.0 wrote, were made with."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import (
    Adaptive,
    AdmitAll,
    AtPromptEnd,
    CachePipeline,
    DuoAttention,
    KeepAll,
    LocalAttention,
    Pyramid,
    Quest,
    RandomGate,
    Ratio,
    SnapKV,
    Tokens,
    TotalCap,
    WriteGate,
    all_of,
    any_of,
    per_layer,
)

FILES = Path(__file__).parents[1] / "data/v010"
SIZES = {"page_size": 4, "interval": 8, "rollback": 2}


def model(layers=2, hidden=16, heads=4, kv_heads=2):
    """A model whose weights have few bits."""
    found = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4,
            max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(_thirtyseconds(*parameter.shape, rng=rng))
    return found


def _gate():
    rng = torch.Generator().manual_seed(3)
    return WriteGate(
        norm_pre=torch.ones(2, 4),
        norm_post=torch.ones(2, 4),
        w1=_thirtyseconds(2, 2, 4, 8, rng=rng),
        b1=_thirtyseconds(2, 2, 4, rng=rng),
        w2=4 * _thirtyseconds(2, 2, 4, rng=rng),
        b2=_thirtyseconds(2, 2, rng=rng),
        window=6,
        threshold=0.5,
    )


def _thirtyseconds(*shape, rng):
    return torch.randint(-32, 33, shape, generator=rng) / 32


def caches():
    """Pipelines of the saved caches, by the names of the files."""
    snapkv = SnapKV(budget=14, observation=4, kernel=3, when="decode")
    dropping = AtPromptEnd(LocalAttention(window=6, sinks=2), generated="keep")
    return {
        "gate-quest-snapkv": CachePipeline(
            admission=_gate(), selection=Quest(budget=12), eviction=snapkv, window=6
        ),
        "at-prompt-end": CachePipeline(eviction=dropping),
    }


def counted(*shape):
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape) / 64


def counted_gate(**options):
    return WriteGate(
        norm_pre=counted(2, 8), norm_post=counted(2, 8), w1=counted(2, 2, 4, 16),
        b1=counted(2, 2, 4), w2=counted(2, 2, 4), b2=counted(2, 2), window=6, **options,
    )  # fmt: skip


def snapkv(budget, **options):
    return CachePipeline(eviction=SnapKV(budget=budget, **options), window=5)


def admitting(admission, **options):
    return CachePipeline(admission=admission, **options)


# What a cache is bound to: each pipeline as it is written today, and its hash in version 0.1.0.
FINGERPRINTS = [
    ("6c8dd340a6b228c2", admitting(counted_gate())),
    ("722230782b2a5d53", admitting(counted_gate(threshold=0.3))),
    ("3a965e401d51111a", admitting(RandomGate(sparsity=0.3), window=5)),
    ("a5d4e849dd9c8086", admitting(LocalAttention(window=5, sinks=2))),
    (
        "7e0d7ddcd450ed13",
        admitting(DuoAttention(full_heads=((True, False), (False, True)), sinks=2, window=6)),
    ),
    (
        "1c0508586fafbdac",
        admitting(all_of(RandomGate(sparsity=0.3), RandomGate(sparsity=0.2, seed=3)), window=5),
    ),
    ("c0cff2db6e37e088", admitting(any_of(counted_gate(), RandomGate(sparsity=0.2, seed=3)))),
    (
        "9e048d5574c825d9",
        admitting(per_layer(AdmitAll(), {range(1, 2): RandomGate(sparsity=0.5)}), window=5),
    ),
    ("b67e66da3f5fc695", CachePipeline(selection=Quest(budget=9), window=5)),
    (
        "532a33549fc0ceff",
        CachePipeline(selection=per_layer(Quest(budget=9), {0: Quest(budget=7)}), window=5),
    ),
    ("b6ada1a752324ff1", snapkv(30, observation=3, when="decode")),
    ("8a8d6aa6b267939d", snapkv(Ratio(0.5))),
    ("c3ade17a69199e54", snapkv(Pyramid(Tokens(100)))),
    ("ed0cc6fb65781ad1", snapkv(Adaptive(Tokens(100)))),
    ("19889f89eed0567c", snapkv(Adaptive(Pyramid(Ratio(0.5))))),
    ("eb21ebb3d8e2a880", snapkv(TotalCap(100))),
    (
        "9f8a82d49d041f58",
        CachePipeline(eviction=per_layer(KeepAll(), {0: SnapKV(budget=30)}), window=5),
    ),
    ("a49026784117d468", CachePipeline(eviction=SnapKV(budget=1024), window=256)),
    ("71b5ec270517c47e", CachePipeline(eviction=AtPromptEnd(counted_gate(), generated="keep"))),
    ("3088c24b89438860", CachePipeline()),
]
