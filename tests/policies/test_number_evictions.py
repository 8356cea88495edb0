"""Evictions by a number of each token, against their originals' rules run step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kvpolicy import (
    GKV,
    H2O,
    CachePipeline,
    CacheSpec,
    FastKVzip,
    KVzap,
    KVzip,
    LocalAttention,
    Ranked,
    Ratio,
    TrimKV,
    Write,
)
from kvpolicy._files import write_pt, write_safetensors
from kvpolicy.calls.settle import seen
from kvpolicy.testing import check_eviction

HEADS, GROUP, DIM, HIDDEN, LAYERS = 2, 2, 8, 12, 2
F64 = torch.float64


def sines(*shape, step):
    """Numbers that are no copies of each other and need no generator."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=F64) * step).sin().view(shape)


def tokens(count):
    """`(q, k, v)` of a layer, float64."""
    return (
        2 * sines(HEADS * GROUP, count, DIM, step=0.37), 2 * sines(HEADS, count, DIM, step=0.73),
        sines(HEADS, count, DIM, step=1.1),
    )  # fmt: skip


def states(eviction, window, prompt, decoded, rollback=3):
    """The cache after the prompt and after every decoded token."""
    pipeline = CachePipeline(eviction=eviction, window=window, backend="reference")
    spec = CacheSpec(
        layers=1, heads=HEADS * GROUP, kv_heads=HEADS, head_dim=DIM, page_size=4, interval=1,
        rollback=rollback, dtype=F64,
    )  # fmt: skip
    state, data = pipeline.init(spec), tokens(prompt + decoded)
    pipeline.begin(state, [prompt], "prompt")
    pipeline.attend(state, 0, *(x[:, :prompt] for x in data))
    pipeline.commit(state)
    pipeline.end_prompt(state)
    yield state
    for at in range(prompt, prompt + decoded):
        pipeline.begin(state, [1], "decode")
        pipeline.attend(state, 0, *(x[None, :, at : at + 1] for x in data))
        pipeline.commit(state)
        yield state


def run(*given):
    """Kept positions `[step][head]` after the prompt and every decoded token."""
    return [[x.kept(0, 0, h).tolist() for h in range(HEADS)] for x in states(*given)]


def weights(query, key, at, kept):
    """Softmax weights `[Hkv, G, w, N]` of queries at positions `at` over each head's tokens."""
    found = torch.zeros(HEADS, GROUP, len(at), max(at) + 1, dtype=F64)
    for h in range(HEADS):
        q = query[h * GROUP : (h + 1) * GROUP, at]
        logits = q @ key[h, kept[h]].T / DIM**0.5
        hide = torch.tensor(kept[h])[None] > torch.tensor(at)[:, None]
        found[h][:, :, kept[h]] = logits.masked_fill(hide, float("-inf")).softmax(-1)
    return found


def h2o(heavy, recent, prompt, decoded, combine):
    """FMInference/H2O: sums over queries move with their tokens, the best `heavy` stay.

    Positions `[step][head]` and the sums of all tokens at the end `[head][token]`.
    """
    query, key, _ = tokens(prompt + decoded)
    kept = [list(range(prompt)) for _ in range(HEADS)]
    sums = torch.zeros(HEADS, prompt + decoded, dtype=F64)
    found = []
    for length in range(prompt, prompt + decoded + 1):
        at = list(range(prompt)) if length == prompt else [length - 1]
        if length > prompt:
            kept = [[*k, length - 1] for k in kept]
        sums[:, :length] += combine(weights(query, key, at, kept)).sum(1)
        for h in range(HEADS):
            old = [j for j in kept[h] if j < length - recent]
            best = sorted(old, key=lambda j, h=h: -float(sums[h, j]))[:heavy]
            kept[h] = sorted(best) + [j for j in kept[h] if j >= length - recent]
        found.append([list(k) for k in kept])
    return found, sums


@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_h2o_goes_the_way_of_the_original(group):
    combine = {"mean": lambda w: w.mean(1), "max": lambda w: w.amax(1), "sum": lambda w: w.sum(1)}
    wanted, _ = h2o(9, 4, 30, 12, combine[group])
    assert run(H2O(budget=13, group=group), 4, 30, 12) == wanted
    other, _ = h2o(9, 4, 30, 12, lambda w: w[:, :1].mean(1))
    assert wanted != other  # the case tells groups apart


@pytest.mark.parametrize("rollback", [0, 1, 3, 7])
def test_every_query_counts_once_whatever_can_be_taken_back(rollback):
    """Queries wait until they cannot be taken back, or until an eviction settles them."""
    window = 4
    kept, sums = h2o(9, window, 30, 12, lambda w: w.mean(1))
    *_, state = states(H2O(budget=13), window, 30, 12, rollback)
    stored = seen(state, state.layers[0]).stored[0]
    for h, positions in enumerate(kept[-1]):
        wanted = sums[h, positions[:-window]]
        torch.testing.assert_close(stored[h, : len(wanted)], wanted)


def test_an_average_is_of_the_queries_that_could_see_a_token():
    """kvpress, observed_attention_press.py: sums over queries / (n - j), the mean of a group."""
    query, key, _ = tokens(30)
    sums = weights(query, key, list(range(30)), [list(range(30))] * HEADS).mean(1).sum(1)
    means = sums / torch.arange(30, 0, -1)
    policy = H2O(budget=13, average=True, when="prompt_end")
    for h, kept in enumerate(run(policy, 4, 30, 0)[0]):
        assert kept == sorted(means[h, :26].topk(9).indices.tolist()) + list(range(26, 30))
    assert run(policy, 4, 30, 0) != run(H2O(budget=13), 4, 30, 0)


def g_kv(budget, observed, alpha, prompt, decoded):
    """microsoft/G-KV, smooth_method "max": scores of a round are those of the next, decayed."""
    query, key, _ = tokens(prompt + decoded)
    kept = [list(range(prompt)) for _ in range(HEADS)]
    memory = torch.zeros(HEADS, prompt + decoded, dtype=F64)
    found = []
    for length in range(prompt, prompt + decoded + 1):
        if length > prompt:
            kept = [[*k, length - 1] for k in kept]
        at = list(range(length - observed, length))
        local = weights(query, key, at, kept).amax(1).mean(1)[:, : length - observed]
        local = local / local.amax(-1, keepdim=True)
        score = torch.maximum(alpha * memory[:, : length - observed], local)
        for h in range(HEADS):
            old = [j for j in kept[h] if j < length - observed]
            best = sorted(old, key=lambda j, h=h: -float(score[h, j]))[: budget - observed]
            kept[h] = sorted(best) + [j for j in kept[h] if j >= length - observed]
            memory[h] = 0
            memory[h, best] = score[h, best]
        found.append([list(k) for k in kept])
    return found


def test_g_kv_goes_the_way_of_the_original():
    wanted = g_kv(14, 4, 0.8, 30, 14)
    assert run(GKV(budget=14, observation=4), 4, 30, 14) == wanted
    assert wanted != g_kv(14, 4, 0.0, 30, 14)  # memory matters
    assert GKV(budget=14, observation=4).prefers_window == 4


def write_of(hidden, layer=0, heads=range(HEADS)):
    key = torch.zeros(len(heads), len(hidden), DIM, dtype=hidden.dtype)
    cu = torch.tensor([0, len(hidden)], dtype=torch.int32)
    return Write(key, key, torch.arange(len(hidden)), cu, layer, heads, hidden=hidden)


def trim(dtype=F64, **options):
    return TrimKV(
        w1=sines(LAYERS, 6, HIDDEN, step=0.9).to(dtype), b1=sines(LAYERS, 6, step=0.3).to(dtype),
        w2=sines(LAYERS, HEADS, 6, step=1.7).to(dtype), b2=sines(LAYERS, HEADS, step=2.2).to(dtype),
        **{"budget": 9} | options,
    )  # fmt: skip


def test_trim_kv_is_log_beta_by_age():
    policy, hidden = trim(), sines(70, HIDDEN, step=0.51)
    for layer in range(LAYERS):
        first, second = torch.nn.Linear(HIDDEN, 6), torch.nn.Linear(6, HEADS)
        for module, name in ((first, "1"), (second, "2")):
            module.double().weight.data = getattr(policy, f"w{name}")[layer]
            module.bias.data = getattr(policy, f"b{name}")[layer]
        wanted = F.logsigmoid(second(F.silu(first(hidden)))).T
        assert torch.allclose(policy.number(write_of(hidden, layer)), wanted, atol=1e-12)
        some = policy.number(write_of(hidden, layer, range(1, 2)))
        assert torch.equal(some, policy.number(write_of(hidden, layer))[1:])


def test_trim_kv_drops_what_decayed_most():
    pipeline = CachePipeline(eviction=trim(budget=11), window=3, backend="reference")
    spec = CacheSpec(
        layers=2, heads=HEADS, kv_heads=HEADS, head_dim=DIM, page_size=4, interval=1, dtype=F64
    )
    state, hidden = pipeline.init(spec), sines(40, HIDDEN, step=0.51)
    beta = trim().number(write_of(hidden))
    key = sines(HEADS, 40, DIM, step=0.3)
    pipeline.begin(state, [20], "prompt")
    for layer in range(2):
        pipeline.attend(state, layer, *[key[:, :20]] * 3, hidden=hidden[:20])
    pipeline.commit(state)
    pipeline.end_prompt(state)
    kept = [list(range(20)) for _ in range(HEADS)]
    for length in range(20, 40):
        if length > 20:
            pipeline.begin(state, [1], "decode")
            one = key[None, :, length - 1 : length]
            for layer in range(2):
                new = hidden[None, length - 1 : length]
                pipeline.attend(state, layer, one, one, one, hidden=new)
            pipeline.commit(state)
            kept = [[*k, length - 1] for k in kept]
        for h in range(HEADS):
            scores = {j: float((length + 1 - j) * beta[h, j]) for j in kept[h] if j < length - 3}
            best = sorted(scores, key=lambda j, s=scores: -s[j])[:8]
            kept[h] = sorted(best) + list(range(length - 3, length))
            assert state.kept(0, 0, h).tolist() == kept[h]


def test_trim_kv_reads_the_authors_layout(tmp_path):
    policy, path = trim(torch.float32), tmp_path / "gates.safetensors"
    policy.save(path)
    again = TrimKV.from_pretrained(path, budget=Ratio(0.5))
    assert torch.equal(again.w1, policy.w1) and torch.equal(again.b2, policy.b2)
    start = "model.layers.0.self_attn."
    other = {f"{start}q_proj.weight": torch.ones(2), f"{start}retention_gate.up_proj.weight": key()}
    write_safetensors(path, other, {})
    with pytest.raises(ValueError, match=r"up_proj.weight: wanted gates of linear1.weight"):
        TrimKV.from_pretrained(path, budget=9)
    write_safetensors(path, {f"{start}q_proj.weight": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="of all layers, got those of"):
        TrimKV.from_pretrained(path, budget=9)


def key():
    return torch.ones(2, 3)


def fast(dtype=F64, **options):
    size, amount = 4, 3
    return FastKVzip(
        q=sines(LAYERS, HEADS * GROUP * size, HIDDEN, step=0.9).to(dtype),
        q_bias=sines(LAYERS, HEADS * GROUP * size, step=0.4).to(dtype),
        k=sines(LAYERS, HEADS * size, HIDDEN, step=1.3).to(dtype),
        q_norm=1 + sines(LAYERS, size, step=0.2).to(dtype) / 4,
        k_norm=1 + sines(LAYERS, size, step=0.6).to(dtype) / 4,
        base=sines(LAYERS, HEADS, 1, amount, size, step=0.8).to(dtype),
        bias=sines(LAYERS, HEADS, 1, GROUP, step=1.9).to(dtype),
        **{"budget": 9} | options,
    )  # fmt: skip


def test_fast_kvzip_is_a_softmax_against_learned_keys():
    """1 / (1 + sum exp(base - logit)) is the weight of the token's own key among the others."""
    policy, hidden = fast(), sines(70, HIDDEN, step=0.51)
    for layer in range(LAYERS):
        q = F.rms_norm(
            (hidden @ policy.q[layer].T + policy.q_bias[layer]).view(-1, HEADS, GROUP, 4), (4,),
            policy.q_norm[layer], 1e-6,
        )  # fmt: skip
        k = F.rms_norm(
            (hidden @ policy.k[layer].T).view(-1, HEADS, 4), (4,), policy.k_norm[layer], 1e-6
        )
        own = torch.einsum("thgd,thd->thg", q, k) / 2 + policy.bias[layer, :, 0]
        rest = torch.einsum("thgd,hjd->thgj", q, policy.base[layer, :, 0]) / 2
        wanted = torch.cat([own[..., None], rest], -1).softmax(-1)[..., 0].mean(-1).T
        assert torch.allclose(policy.number(write_of(hidden, layer)), wanted, atol=1e-12)
        some = policy.number(write_of(hidden, layer, range(1, 2)))
        assert torch.equal(some, policy.number(write_of(hidden, layer))[1:])


def test_fast_kvzip_reads_the_authors_layout(tmp_path):
    policy, path = fast(torch.float32), tmp_path / "gate.pt"
    policy.save(path)
    again = FastKVzip.from_pretrained(path, budget=9)
    assert torch.equal(again.base, policy.base) and torch.equal(again.q, policy.q)
    write_pt(path, {"module": [{"q_proj.weight": key()}]})
    with pytest.raises(ValueError, match="layer 0: wanted"):
        FastKVzip.from_pretrained(path, budget=9)
    write_pt(path, {"module": []})
    with pytest.raises(ValueError, match="a list of layers"):
        FastKVzip.from_pretrained(path, budget=9)


def zap(dtype=F64):
    return KVzap(
        w2=sines(LAYERS, HEADS, HIDDEN, step=0.7).to(dtype),
        b2=sines(LAYERS, HEADS, step=1.1).to(dtype), window=4,
    )  # fmt: skip


def test_a_gate_ranks():
    hidden = sines(33, HIDDEN, step=0.51)
    policy = Ranked(gate=zap(), budget=12, sinks=2)
    pipeline = CachePipeline(eviction=policy, backend="reference")
    assert pipeline.window == 4 and policy.needs == {"hidden"}
    spec = CacheSpec(layers=2, heads=HEADS, kv_heads=HEADS, head_dim=DIM, page_size=4, dtype=F64)
    state, same = pipeline.init(spec), [sines(HEADS, 33, DIM, step=0.3)] * 3
    pipeline.begin(state, [33], "prompt")
    for layer in range(2):
        pipeline.attend(state, layer, *same, hidden=hidden)
    pipeline.commit(state)
    pipeline.end_prompt(state)
    scores = hidden @ zap().w2[0].T + zap().b2[0]
    for h in range(HEADS):
        best = sorted(range(2, 29), key=lambda j, h=h: -float(scores[j, h]))[:6]
        assert state.kept(0, 0, h).tolist() == [0, 1, *sorted(best), *range(29, 33)]
    with pytest.raises(ValueError, match=r"gate: wanted an admission that scores tokens"):
        Ranked(gate=LocalAttention(window=4), budget=9)


@pytest.mark.parametrize(
    "policy",
    [
        H2O(budget=40), H2O(budget=40, when="prompt_end", group="max"), GKV(budget=40),
        KVzip(budget=40), trim(torch.float32, budget=40), fast(torch.float32, budget=40),
        Ranked(gate=zap(torch.float32), budget=40, when="decode"),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_the_kit(policy):
    check_eviction(policy, kv_heads=HEADS, group=GROUP, head_dim=DIM, hidden=HIDDEN)
