"""SnapKV's scores against the original's computation in float64, and AtPromptEnd."""

from __future__ import annotations

import importlib
import itertools

import attrs
import numpy as np
import pytest
import torch

from kvpolicy import Adaptive, CachePipeline, CacheSpec, EvictionView, Tokens
from kvpolicy.admission import LocalAttention, RandomGate
from kvpolicy.eviction import AtPromptEnd, KeepAll, SnapKV
from kvpolicy.reference import keep_best

SCALE = 0.3
KV_HEADS, GROUP, DIM = 2, 3, 8


def random_prompt(length, seed=0):
    rng = np.random.RandomState(seed)
    return rng.randn(KV_HEADS * GROUP, length, DIM), rng.randn(KV_HEADS, length, DIM)


def make_view(prompts, window, queries, stored, dtype=torch.float64):
    """What a cache shows after `prompts`; `stored[b][h]` lists global positions."""
    batch, width = len(prompts), max((len(s) for row in stored for s in row), default=0)
    keys = torch.full((batch, KV_HEADS, width, DIM), 1e3, dtype=dtype)  # padding must not matter
    positions = torch.zeros(batch, KV_HEADS, width, dtype=torch.long)
    valid = torch.zeros(batch, KV_HEADS, width, dtype=torch.bool)
    recent = torch.full((batch, KV_HEADS, window, DIM), 1e3, dtype=dtype)
    q_last = torch.full((batch, KV_HEADS * GROUP, queries, DIM), 1e3, dtype=dtype)
    lengths = torch.tensor([q.shape[1] for q, _ in prompts])
    for b, (q, k) in enumerate(prompts):
        for h, tokens in enumerate(stored[b]):
            keys[b, h, : len(tokens)] = torch.from_numpy(k[h, tokens])
            positions[b, h, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            valid[b, h, : len(tokens)] = True
        n = k.shape[1]
        recent[b, :, max(window - n, 0) :] = torch.from_numpy(k[:, max(n - window, 0) :])
        q_last[b, :, max(queries - n, 0) :] = torch.from_numpy(q[:, max(n - queries, 0) :])
    return EvictionView(
        layer=0,
        keys=keys,
        values=keys,
        positions=positions,
        valid=valid,
        marked=torch.zeros_like(valid),
        recent_keys=recent,
        recent_valid=torch.arange(window) >= window - lengths[:, None],
        lengths=lengths,
        scale=SCALE,
        queries=q_last,
        query_valid=torch.arange(queries) >= queries - lengths[:, None],
    )


def pooled(mass, kernel, pooling):
    half = kernel // 2
    padded = np.pad(mass, half)
    parts = [padded[i : i + kernel] for i in range(len(mass))]
    return np.array([p.mean() if pooling == "avg" else p.max() for p in parts])


def attention_by_hand(q, k, tokens, at):
    """Softmax weights of a query at position `at` over `tokens`, those after it zero."""
    weights = np.array([np.exp(q @ k[j] * SCALE) if j <= at else 0.0 for j in tokens])
    return weights / weights.sum() if weights.sum() else weights


def scores_by_hand(policy, prompt, head, window, tokens):
    q, k = prompt
    n = k.shape[1]
    near = list(range(max(n - window, 0), n)) if policy.normalize == "visible" else []
    rows = range(max(n - policy.observation, 0), n)
    weights = np.array(
        [
            [attention_by_hand(q[g, i], k[head], tokens + near, i)[: len(tokens)] for i in rows]
            for g in range(head * GROUP, (head + 1) * GROUP)
        ]
    )  # [G, w, N]
    if policy.normalize == "global" and policy.group == "max":
        mass = weights.max(0).mean(0)
    else:
        mass = getattr(weights.mean(1), policy.group)(0)
    return pooled(mass, policy.kernel, policy.pooling)


def original(q, k, window, kernel, pooling):
    """FasterDecoding/SnapKV for one query head: scores of the tokens before the last `window`."""
    n = k.shape[0]
    logits = q[n - window :] @ k.T * SCALE
    logits[:, n - window :][np.triu_indices(window, 1)] = -np.inf
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return pooled(weights[:, : n - window].sum(0), kernel, pooling)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_without_groups_it_is_the_original(pooling):
    window, length = 6, 40
    q, k = random_prompt(length)
    same = np.concatenate([q[[0]]] * GROUP + [q[[GROUP]]] * GROUP)  # every group of equal queries
    tokens = list(range(length - window))
    view = make_view([(same, k)], window, window, [[tokens, tokens]])
    policy = SnapKV(budget=20, observation=window, kernel=5, pooling=pooling)
    scores = policy.score(view)[0] * window  # the original sums over queries
    for head in range(KV_HEADS):
        wanted = original(same[head * GROUP], k[head], window, 5, pooling)
        assert np.allclose(scores[head].numpy(), wanted, atol=1e-12)
        # Pooling by the largest gives ties; the kept scores are the original's all the same.
        kept = keep_best(scores[head], torch.ones(34).bool(), torch.tensor(14))
        assert np.allclose(np.sort(wanted[kept.numpy()]), np.sort(wanted)[-14:])


CASES = list(itertools.product(["mean", "max"], ["avg", "max"], ["visible", "global"]))


@pytest.mark.parametrize(("group", "pooling", "normalize"), CASES)
@pytest.mark.parametrize("length", [1, 3, 6, 7, 40])
@pytest.mark.parametrize(("window", "observation"), [(6, 6), (9, 4), (4, 9)])
def test_scores_are_the_formula(group, pooling, normalize, length, window, observation):
    policy = SnapKV(
        budget=20,
        observation=observation,
        kernel=3,
        group=group,
        pooling=pooling,
        normalize=normalize,
    )
    prompt = random_prompt(length, seed=length)
    old = list(range(max(length - window, 0)))
    stored = [old, old[::3]]  # admission leaves heads of different lengths
    scores = policy.score(make_view([prompt], window, observation, [stored]))
    assert not scores.isnan().any()
    for head, tokens in enumerate(stored):
        wanted = scores_by_hand(policy, prompt, head, window, tokens) if tokens else []
        assert np.allclose(scores[0, head, : len(tokens)].numpy(), wanted, atol=1e-12)


def test_a_query_does_not_see_later_tokens():
    # Without the mask a token that only one query may see would collect the others' weight.
    prompt = random_prompt(12)
    policy = SnapKV(budget=20, observation=8, kernel=1, group="mean")
    before = policy.score(make_view([prompt], 2, 8, [[list(range(10))] * 2]))
    q, k = prompt[0].copy(), prompt[1]
    q[:, 4:9] *= -3  # queries at 4..8 cannot weigh token 9
    after = policy.score(make_view([(q, k)], 2, 8, [[list(range(10))] * 2]))
    assert torch.equal(before[..., 9], after[..., 9])
    assert not torch.allclose(before[..., 0], after[..., 0])


@pytest.mark.parametrize("seed", range(4))
def test_heads_that_tie_keep_the_same_alone_and_in_a_batch(seed):
    """Few tokens, shared between heads: sums of weights decide, down to how they were rounded."""
    draw = torch.Generator().manual_seed(seed)
    heads, spec = 4, CacheSpec(layers=1, heads=4, kv_heads=4, head_dim=8, page_size=4)
    alone, longer = ([torch.randn(heads, n, 8, generator=draw) for _ in range(3)] for n in (11, 40))
    budget = Adaptive(Tokens(10), 0.2)
    pipeline = CachePipeline(
        eviction=SnapKV(budget=budget, normalize="global"), window=8, backend="reference"
    )
    found = []
    for rows in ([alone], [alone, longer], [longer, alone]):
        state = pipeline.init(spec, len(rows))
        pipeline.begin(state, [row[0].shape[1] for row in rows], "prompt")
        pipeline.attend(state, 0, *(torch.cat(x, 1) for x in zip(*rows, strict=True)))
        pipeline.commit(state)
        pipeline.end_prompt(state)
        place = len(rows) - 1 if rows[0] is longer else 0
        found.append([state.kept(0, place, head).tolist() for head in range(heads)])
    assert found[0] == found[1] == found[2]
    assert any(len(kept) < 11 for kept in found[0])


def test_padding_of_a_batch_changes_nothing():
    policy = SnapKV(budget=20, observation=5, kernel=5, group="max")
    prompts = [random_prompt(n, seed=n) for n in (30, 3, 11)]
    stored = [[list(range(24)), list(range(0, 24, 5))], [[], []], [list(range(5)), [4]]]
    together = policy.score(make_view(prompts, 6, 5, stored))
    assert not together.isnan().any()
    for b, (prompt, tokens) in enumerate(zip(prompts, stored, strict=True)):
        alone = policy.score(make_view([prompt], 6, 5, [tokens]))[0]
        for head, row in enumerate(tokens):
            assert torch.allclose(together[b, head, : len(row)], alone[head, : len(row)])


@pytest.mark.parametrize("normalize", ["visible", "global"])
def test_low_precision_overflows_nothing(normalize):
    q, k = random_prompt(20)
    view = make_view([(q * 200, k * 200)], 4, 4, [[list(range(16))] * 2], dtype=torch.bfloat16)
    scores = SnapKV(budget=20, observation=4, normalize=normalize).score(view)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


def test_observation_is_the_number_of_queries():
    assert SnapKV(budget=20, observation=7).queries == 7
    assert not SnapKV(budget=20).neutral
    assert SnapKV(budget=20) == SnapKV(budget=20, kernel=5)
    assert len({SnapKV(budget=20), SnapKV(budget=20), SnapKV(budget=21)}) == 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        SnapKV(budget=20).kernel = 3


def test_keep_all_is_neutral():
    view = make_view([random_prompt(9)], 4, 1, [[[0, 1], [3]]])
    assert KeepAll().neutral
    assert KeepAll().score(view).isfinite().all()


def test_at_prompt_end_drops_what_the_admission_would_not_write(make_write):
    policy = AtPromptEnd(RandomGate(sparsity=0.5))
    write = make_write(tokens=10, kv_heads=2)
    marks = policy.mark(write)
    assert torch.equal(marks, RandomGate(sparsity=0.5).admit(write))
    view = make_view([random_prompt(14)], 4, 1, [[list(range(10))] * 2])
    scores = policy.score(view._replace(marked=marks[None]))
    assert torch.equal(scores == float("-inf"), ~marks[None])
    assert (scores[marks[None]] == scores.max()).all()


def test_at_prompt_end_hands_on_to_its_admission(make_write):
    @attrs.frozen
    class Spy(RandomGate):
        sparsity: float = 0.5
        needs = frozenset({"hidden"})

        def at(self, layer):
            return attrs.evolve(self, seed=layer)

        def check(self, layers, kv_heads, head_dim):
            raise ValueError(f"checked {layers} {kv_heads} {head_dim}")

        def place(self, device, dtype, backend):
            return attrs.evolve(self, seed=99)

    policy = AtPromptEnd(Spy())
    assert policy.needs == {"hidden"}
    assert policy.at(4).admission.seed == 4
    assert policy.place(torch.device("cpu"), torch.float32, "reference").admission.seed == 99
    with pytest.raises(ValueError, match="checked 1 2 3"):
        policy.check(1, 2, 3)
    assert policy.window is None
    assert AtPromptEnd(LocalAttention(window=7)).window == 7
    assert AtPromptEnd(LocalAttention()) == AtPromptEnd(LocalAttention())


def test_scores_from_pages_do_not_depend_on_chunks(monkeypatch):
    pipeline = CachePipeline(window=4, eviction=SnapKV(budget=9, observation=3, kernel=3))
    spec = CacheSpec(layers=1, heads=4, kv_heads=2, head_dim=8, page_size=2)
    make = torch.Generator().manual_seed(3)
    query, key = (torch.randn(heads, 30, 8, generator=make) for heads in (4, 2))
    kept, module = [], importlib.import_module("kvpolicy.reference.window_scores")
    for most in (1 << 22, 1):
        monkeypatch.setattr(module, "_LOGITS", most)
        state = pipeline.init(spec)
        pipeline.begin(state, [30], "prompt")
        pipeline.attend(state, 0, query, key, key)
        pipeline.commit(state)
        pipeline.end_prompt(state)
        kept.append([state.kept(0, 0, head).tolist() for head in range(2)])
    assert kept[0] == kept[1]
    assert len(kept[0][0]) == 9
