"""Presses of kvpress as evictions: objects with its `score`, none of it installed.

Their formulas are written anew here; kept sets are those of the library's own policies.
"""

from __future__ import annotations

import math

import attrs
import pytest
import torch
import torch.nn.functional as F

from kvpolicy import (
    CachePipeline,
    CacheSpec,
    ExpectedAttention,
    Knorm,
    KVPress,
    RandomGate,
    Rope,
    SnapKV,
)
from kvpolicy.testing import check_eviction
from tests.support.sines import DIM, ROPE, WEIGHT, T, kept

HELD = 16


class Norms:
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.norm(dim=-1)


class Expected:
    """kvpress's ExpectedAttentionPress, from its formula."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        heads, dim, n = module.config.num_attention_heads, module.head_dim, hidden_states.shape[1]
        q = module.q_proj(hidden_states[:, 4:]).unflatten(2, (heads, dim)).transpose(1, 2)
        mean = q.mean(2)
        away = q - mean[:, :, None]
        spread = away.mT @ away / q.shape[2]
        cos, sin = module.rotary_emb(mean, torch.arange(n, n + 512)[None])
        half = dim // 2
        c, s = (torch.diag(x[0].mean(0)[:half]) for x in (cos, sin))
        turn = torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)])
        mean, spread = mean @ turn.T, turn @ spread @ turn.T
        k = keys[:, :, 4:].repeat_interleave(module.num_key_value_groups, 1)
        logits = torch.einsum("bhnd,bhd->bhn", k, mean) / math.sqrt(dim)
        logits = logits + torch.einsum("bhnd,bhde,bhne->bhn", k, spread, k) / (2 * dim)
        weights = logits.softmax(-1).unflatten(1, (keys.shape[1], -1)).mean(2)
        scores = weights * values[:, :, 4:].norm(dim=-1)
        return F.pad(scores, (4, 0), value=float(scores.max()))


class Snap:
    """SnapKVPress's, from its formula: window of 6, kernel of 3."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        heads, dim = module.config.num_attention_heads, module.head_dim
        q = module.q_proj(hidden_states[:, -6:]).unflatten(2, (heads, dim)).transpose(1, 2)
        cos, sin = (x[:, -6:] for x in kwargs["position_embeddings"])
        half = torch.cat([-q[..., dim // 2 :], q[..., : dim // 2]], -1)
        q = q * cos + half * sin
        k = keys.repeat_interleave(module.num_key_value_groups, 1)
        logits = q @ k.mT / math.sqrt(dim)
        causal = torch.ones(6, keys.shape[2]).tril(keys.shape[2] - 6).bool()
        weights = logits.masked_fill(~causal, -math.inf).softmax(-1)[..., :-6].mean(2)
        weights = F.avg_pool1d(weights, 3, 1, 1).unflatten(1, (keys.shape[1], -1)).mean(2)
        return F.pad(weights, (0, 6), value=float(weights.max()))


def test_scores_of_a_press_are_the_policys():
    assert kept(KVPress(press=Norms(), budget=HELD), window=1) == kept(Knorm(budget=HELD))
    assert kept(KVPress(press=Norms(), budget=HELD)) == kept(Knorm(budget=HELD))
    own = SnapKV(budget=HELD, observation=6, kernel=3)
    for across in (False, True):
        press = KVPress(press=Snap(), budget=HELD, inputs=7, across_heads=across)
        assert kept(press, window=6) == kept(own)
    stats = KVPress(press=Expected(), budget=HELD, reads="statistics")
    assert kept(stats, window=1) == kept(ExpectedAttention(budget=HELD))


def test_statistics_become_queries_with_these_moments():
    from kvpolicy.eviction.kv_press import _of_statistics

    rng = torch.Generator().manual_seed(0)
    sample = torch.randn(3, 40, 8, generator=rng, dtype=torch.float64)
    mean = sample.mean(1)
    away = sample - mean[:, None]
    made = _of_statistics(mean, away.mT @ away / 40)
    off = made - made.mean(1, keepdim=True)
    assert torch.allclose(made.mean(1), mean)
    assert torch.allclose(off.mT @ off / made.shape[1], away.mT @ away / 40)


class Looking:
    """Keeps what it is shown."""

    def __init__(self):
        self.seen = []

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        self.seen.append((module, hidden_states, keys, values))
        return keys.sum(-1)


def test_what_a_press_is_shown():
    press = Looking()
    kept(KVPress(press=press, budget=HELD, output_weight=True, inputs=5), window=4)
    module, hidden, keys, values = press.seen[1]
    assert keys.shape == values.shape == (1, 1, T, DIM) and hidden.shape == (1, 5, 2 * DIM)
    assert torch.equal(module.o_proj.weight, WEIGHT[2:].flatten(0, 1).T)
    assert module.config.num_key_value_heads == 1 and module.num_key_value_groups == 2
    spec = CacheSpec(layers=1, heads=4, kv_heads=2, head_dim=DIM, hidden=3, page_size=4)
    policy = KVPress(press=Looking(), budget=9, reads="hidden", inputs=6)
    pipeline = CachePipeline(eviction=policy, window=4, backend="reference")
    state = pipeline.init(spec)
    pipeline.tell(state, 0, rope=ROPE)
    pipeline.begin(state, [20], "prompt")
    tokens = (torch.randn(h, 20, DIM) for h in (4, 2, 2))
    inputs = torch.randn(20, 3)
    pipeline.attend(state, 0, *tokens, hidden=inputs)
    pipeline.commit(state)
    pipeline.end_prompt(state)
    module, hidden, _, _ = policy.press.seen[0]
    assert torch.equal(hidden[0], inputs[-6:]) and not hasattr(module, "q_proj")


def test_ragged_heads_go_one_by_one_or_are_refused():
    """An admission leaves heads of different lengths."""
    gate = RandomGate(sparsity=0.4)
    press = KVPress(press=Norms(), budget=HELD)
    assert kept(press, window=2, admission=gate) == kept(
        Knorm(budget=HELD), window=2, admission=gate
    )
    with pytest.raises(ValueError, match="across_heads: wanted heads that hold as many tokens"):
        kept(attrs.evolve(press, across_heads=True), window=2, admission=gate)


class Wrong:
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return keys[..., 0, 0]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"Wrong\.score: wanted \[1, 1, 48\], got \[1, 1\]"):
        kept(KVPress(press=Wrong(), budget=HELD), window=1)
    half = Rope(frequencies=(1.0, 0.1))
    with pytest.raises(ValueError, match="rope: presses turn all 8 channels"):
        kept(KVPress(press=Norms(), budget=HELD), window=1, rope=half)


@pytest.mark.parametrize("reads", ["queries", "statistics", "hidden"])
def test_it_conforms(reads):
    check_eviction(KVPress(press=Norms(), budget=24, reads=reads))
