"""Every eviction scores what is stored without a copy of a layer, as it scores a view."""

from __future__ import annotations

import attrs
import pytest
import torch

import kvpolicy.eviction
from kvpolicy import (
    GKV,
    H2O,
    RKV,
    TOVA,
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    CapKV,
    CriticalKV,
    DBudgetKV,
    Eviction,
    ExpectedAttention,
    FastGen,
    FastKVzip,
    JudgeQ,
    KeepAll,
    KeyDiff,
    Knorm,
    KVPress,
    KVzip,
    LagKV,
    QFilters,
    RandomGate,
    Ranked,
    SageKV,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    TriAttention,
    TrimKV,
)
from kvpolicy.calls import score as scoring
from kvpolicy.testing._cache import end_prompt, prompt, random_data

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN = 2, 4, 2, 16, 24
RNG = torch.Generator().manual_seed(2)
# Scores by a number of each token or by its position alone: there is nothing to read.
BY_NUMBER = (H2O, KVzip, JudgeQ, FastKVzip, Ranked, TrimKV, StreamingLLM, AtPromptEnd, KeepAll)


def draw(*shape):
    return torch.randn(shape, generator=RNG)


@attrs.frozen
class NormPress:
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.norm(dim=-1) - values.norm(dim=-1)


def tri(**options):
    part = draw(LAYERS, HEADS, DIM // 2)
    return TriAttention(budget=20, real=part, imaginary=-part, size=2 * part.abs(), **options)


POLICIES = [
    CapKV(budget=20),
    CriticalKV(SnapKV(budget=20, observation=6)),
    CriticalKV(KeyDiff(budget=20)),
    DBudgetKV(threshold=0.3, observation=6),
    ExpectedAttention(budget=20),
    FastGen(recovery=0.8, observation=6),
    FastGen(recovery=0.8, observation=24),  # queries older than some stored tokens
    GKV(budget=20, observation=6),
    KeyDiff(budget=20),
    Knorm(budget=20),
    KVPress(press=NormPress(), budget=20),
    LagKV(budget=20, lag=8),
    LagKV(budget=20, lag=5, sinks=0, cross_scoring=True),
    LagKV(budget=20, lag=64),
    QFilters(budget=20, filters=draw(LAYERS, KV_HEADS, DIM)),
    RKV(budget=20),
    SageKV(budget=20),
    SimLayerKV(threshold=0.5, recent=30, observation=6),
    SnapKV(budget=20, observation=6),
    TOVA(budget=20),
    TOVA(budget=20, across_heads=True),
    tri(),
    tri(group="mean", normalize=False, keep_prompt=True),
]


def filled(policy, backend, tokens=90):
    """Two sequences of ragged heads, one hardly longer than the window."""
    admission = RandomGate(sparsity=0.3)
    pipeline = CachePipeline(admission=admission, eviction=policy, window=9, backend=backend)
    spec = CacheSpec(
        layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, hidden=HIDDEN, page_size=4
    )
    data = random_data(spec, [tokens, 11], 2, HIDDEN, 0)
    return pipeline, prompt(pipeline, data, tokens), data


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_nothing_is_copied_and_scores_are_those_of_the_view(policy, monkeypatch):
    _, state, _ = filled(policy, "reference")
    of_view = scoring.view

    def refused():
        raise AssertionError("a layer's pages were copied")

    def without(*given):
        return attrs.evolve(of_view(*given), keys=refused, values=refused)

    for layer in state.layers:
        most = int(layer.counts.max())
        assert most
        wanted = layer.eviction.score(of_view(state, layer, most))
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "view", without)
            found, valid = scoring.score(state, layer, most)
        assert found.dtype == wanted.dtype or policy.budget is None
        for x in (found, wanted):
            x.masked_fill_(~valid, 0)
        torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [x for x in POLICIES if type(x) not in (TOVA, SageKV)], ids=repr)
def test_kernels_keep_what_the_reference_keeps(policy):
    kept = []
    for backend in ("reference", "triton"):
        pipeline, state, data = filled(policy, backend, tokens=48)
        end_prompt(pipeline, state, data, 11)
        kept.append([
            state.kept(n, b, h).tolist()
            for n in range(LAYERS) for b in range(2) for h in range(KV_HEADS)
        ])  # fmt: skip
    assert kept[0] == kept[1]
    assert policy.budget is None or len(kept[0][0]) == 20


def test_no_eviction_is_left_out():
    every = {
        x for x in vars(kvpolicy.eviction).values()
        if isinstance(x, type) and issubclass(x, Eviction) and x is not Eviction
    }  # fmt: skip
    assert every == {type(x) for x in POLICIES} | set(BY_NUMBER)


@pytest.mark.parametrize("rows", [1, 2])
def test_views_say_which_slots_are_used(rows):
    """What the cache knows of one sequence is what a view finds; another `valid` is looked at."""
    pipeline = CachePipeline(admission=RandomGate(sparsity=0.3), window=9, backend="reference")
    spec = CacheSpec(layers=1, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM, page_size=4)
    data = random_data(spec, [40, 11][:rows], 0, 4, 0)
    layer = (state := prompt(pipeline, data, 40)).layers[0]
    view = scoring.view(state, layer, int(layer.counts.max()))
    wanted = [int(counts.max()) for counts in layer.counts]
    assert view.used == attrs.evolve(view, used=None).used == wanted and wanted[0] > 4
    view = view._replace(valid=view.valid & (view.positions < 3))
    assert view.used == view.valid.sum(-1).amax(1).tolist() != wanted


def test_once_a_round_means_once_for_the_same_lengths():
    _, state, _ = filled(KeepAll(), "reference", tokens=20)
    shared = {}
    first, second = (scoring.view(state, layer, 20, shared) for layer in state.layers)
    assert first.once("what", lambda: 1) == second.once("what", lambda: 2) == 1
    assert second.once("else", lambda: 2) == 2
    assert first._replace(lengths=first.lengths + 1).once("what", lambda: 3) == 3
    assert scoring.view(state, state.layers[0], 20).once("what", lambda: 4) == 4
