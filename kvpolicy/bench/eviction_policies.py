"""Every eviction with its recommended parameters, and made-up weights where it wants a file's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..admission import KVzap, RandomGate
from ..budget import Tokens
from ..eviction import (
    GKV,
    H2O,
    RKV,
    TOVA,
    AtPromptEnd,
    CapKV,
    CriticalKV,
    DBudgetKV,
    Eviction,
    ExpectedAttention,
    FastGen,
    FastKVzip,
    JudgeQ,
    KeyDiff,
    Knorm,
    KVPress,
    KVzip,
    LagKV,
    QFilters,
    Ranked,
    SageKV,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    TriAttention,
    TrimKV,
)
from .context import Bench

LAYERS, HEADS, KV_HEADS, DIM = 32, 32, 8, 128
_HIDDEN, _GATE = 8, 4  # of weights that only writing uses

# What reads more than the keys once: values through the projection, all pairs of keys, and what
# somebody else's code asks for.
DEEPER = ("CriticalKV", "RKV", "KVPress")


def sizes(bench: Bench) -> tuple[int, int, int, int]:
    """Layers, query heads, KV heads and channels."""
    return bench.pick(LAYERS, 1), bench.pick(HEADS, 4), bench.pick(KV_HEADS, 2), bench.pick(DIM, 32)


class _Norms:
    """A press: the smallest norms of keys and values."""

    def score(self, *given: Any) -> Tensor:
        keys, values = given[2:4]
        found: Tensor = -keys.norm(dim=-1) - values.norm(dim=-1)
        return found


def policies(bench: Bench) -> dict[str, Callable[[Tokens], Eviction]]:
    """Those that score, by name; SnapKV is what they are set beside."""
    layers, heads, kv_heads, dim = sizes(bench)
    part = torch.ones(layers, heads, dim // 2)
    series: dict[str, Any] = {"real": part, "imaginary": part, "size": 2 * part}
    ones = torch.ones
    trim: dict[str, Any] = {
        "w1": ones(layers, 1, _HIDDEN), "b1": ones(layers, 1), "w2": ones(layers, kv_heads, 1),
        "b2": ones(layers, kv_heads),
    }  # fmt: skip
    fast: dict[str, Any] = {
        "q": ones(layers, heads * _GATE, _HIDDEN), "q_bias": ones(layers, heads * _GATE),
        "k": ones(layers, kv_heads * _GATE, _HIDDEN), "q_norm": ones(layers, _GATE),
        "k_norm": ones(layers, _GATE), "base": ones(layers, kv_heads, 1, 2, _GATE),
        "bias": ones(layers, kv_heads, 1, heads // kv_heads),
    }  # fmt: skip
    zap = KVzap(w2=ones(layers, kv_heads, _HIDDEN), b2=ones(layers, kv_heads), window=None)
    filters = ones(layers, kv_heads, dim)
    return {
        "AtPromptEnd": lambda n: AtPromptEnd(RandomGate(sparsity=0.5)),
        "StreamingLLM": lambda n: StreamingLLM(budget=n),
        "TOVA": lambda n: TOVA(budget=n),
        "SageKV": lambda n: SageKV(budget=n),
        "GKV": lambda n: GKV(budget=n),
        "KeyDiff": lambda n: KeyDiff(budget=n),
        "Knorm": lambda n: Knorm(budget=n),
        "LagKV": lambda n: LagKV(budget=n),
        "QFilters": lambda n: QFilters(budget=n, filters=filters),
        "TriAttention": lambda n: TriAttention(budget=n, **series),
        "DBudgetKV": lambda n: DBudgetKV(),
        "FastGen": lambda n: FastGen(),
        "SimLayerKV": lambda n: SimLayerKV(),
        "H2O": lambda n: H2O(budget=n),
        "KVzip": lambda n: KVzip(budget=n),
        "JudgeQ": lambda n: JudgeQ(budget=n, embeds=ones(1, _HIDDEN)),
        "FastKVzip": lambda n: FastKVzip(budget=n, **fast),
        "TrimKV": lambda n: TrimKV(budget=n, **trim),
        "Ranked": lambda n: Ranked(budget=n, gate=zap),
        "ExpectedAttention": lambda n: ExpectedAttention(budget=n),
        "CapKV": lambda n: CapKV(budget=n),
        "CriticalKV": lambda n: CriticalKV(SnapKV(budget=n)),
        "RKV": lambda n: RKV(budget=n),
        "KVPress": lambda n: KVPress(press=_Norms(), budget=n),
    }
