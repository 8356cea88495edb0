"""What evictions may ask for besides stored tokens, against the tokens that went in."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import CachePipeline, CacheSpec, Eviction, PhaseError, Rope, Tokens
from kvpolicy.store import load, save
from kvpolicy.store.fork import select_rows
from kvpolicy.store.moments import BLOCK
from kvpolicy.store.rollback import crop

HIDDEN, WINDOW, DIM = 6, 5, 4
SPEC = CacheSpec(
    layers=2, heads=4, kv_heads=2, head_dim=DIM, page_size=4, rollback=9, interval=8, hidden=HIDDEN
)
LONG = 3 * BLOCK


@attrs.frozen(kw_only=True)
class Asking(Eviction):
    """Scores by all that it may ask for; keeps the latest tokens' worth of it."""

    budget: Tokens = Tokens(60)
    query_stats: bool = True
    query_skip: int = 3
    hidden: int = 4
    output_weight: bool = True
    rope: bool = True
    seen: list = attrs.field(factory=list, eq=False, repr=False, metadata={"fingerprint": False})

    def score(self, view):
        stats = view.query_stats
        self.seen.append((view.layer, view.heads, stats, view.hidden, view.hidden_valid,
                          view.recent_values, view.recent_valid, view.output_weight, view.rope,
                          view.lengths))  # fmt: skip
        mean = stats.mean.unflatten(1, (view.keys.shape[1], -1)).mean(2)
        turned = torch.einsum("bhnd,bhd->bhn", view.keys, mean)
        spread = stats.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        spread = spread.unflatten(1, (view.keys.shape[1], -1)).mean(2)
        return turned * spread[..., None] + view.hidden.sum((1, 2))[:, None, None]


class Data:
    """Tokens of sequences, by layer, each drawn once."""

    def __init__(self, rows, length, seed=0, spec=SPEC):
        rng = torch.Generator().manual_seed(seed)
        sizes = {"query": spec.heads, "key": spec.kv_heads, "value": spec.kv_heads}
        self.rows, self.spec = rows, spec
        self.layers = [
            {n: torch.randn(rows, h, length, DIM, generator=rng).to(spec.dtype)
             for n, h in (*sizes.items(), ("query_pre", spec.heads))}
            | {"hidden": torch.randn(rows, length, HIDDEN, generator=rng).to(spec.dtype)}
            for _ in range(spec.layers)
        ]  # fmt: skip
        self.weight = torch.randn(spec.heads, DIM, HIDDEN, generator=rng).to(spec.dtype)
        self.at = [0] * rows


ROPE = Rope(frequencies=(1.0, 0.1))


def start(data, batch=None):
    pipeline = CachePipeline(eviction=Asking(), window=WINDOW, backend="reference")
    state = pipeline.init(data.spec, batch or data.rows)
    tell(pipeline, state, data)
    return pipeline, state


def tell(pipeline, state, data):
    for layer in range(data.spec.layers):
        pipeline.tell(state, layer, output_weight=data.weight, rope=ROPE)


def prompt(pipeline, state, data, counts, commit=True):
    pipeline.begin(state, counts, "prompt")
    for index, layer in enumerate(data.layers):
        spans = [slice(at, at + n) for at, n in zip(data.at, counts, strict=True)]
        parts = {
            name: torch.cat([x[b][..., s, :] for b, s in enumerate(spans)], -2)
            for name, x in layer.items()
        }
        pipeline.attend(state, index, **parts)
    if not commit:
        pipeline.abort(state)
        return
    pipeline.commit(state)
    data.at = [at + n for at, n in zip(data.at, counts, strict=True)]


def decode(pipeline, state, data, columns=1, commit=True, skipped=()):
    """A decode call; in columns of `skipped` the last sequence has no token."""
    valid = torch.ones(data.rows, columns, dtype=torch.bool)
    valid[-1, list(skipped)] = False
    lengths = valid.sum(1).tolist()
    pipeline.begin(state, lengths, "decode", valid=valid if columns > 1 else None)
    for index, layer in enumerate(data.layers):
        found = {}
        for name, x in layer.items():
            out = x.new_full((data.rows, *x.shape[1:-2], columns, x.shape[-1]), 1e3)
            for b, at in enumerate(data.at):
                out[b][..., valid[b], :] = x[b][..., at : at + lengths[b], :]
            found[name] = out
        pipeline.attend(state, index, **found)
    if not commit:
        pipeline.abort(state)
        return
    pipeline.commit(state)
    data.at = [at + n for at, n in zip(data.at, lengths, strict=True)]


def shown(pipeline, state):
    """What the eviction sees now, by layer; nothing is evicted."""
    from kvpolicy.calls.score import view

    found = []
    for layer in state.layers:
        layer.eviction.seen.clear()
        layer.eviction.score(view(state, layer, int(layer.counts.max())))
        found.append(layer.eviction.seen.pop())
    return found


def check(pipeline, state, data):
    for index, found in enumerate(shown(pipeline, state)):
        layer, heads, stats, hidden, hidden_valid, values, near, weight, rope, lengths = found
        assert (layer, heads, rope) == (index, range(2), ROPE)
        assert weight is data.weight and lengths.tolist() == data.at
        tokens = data.layers[index]
        for row, n in enumerate(data.at):
            q = tokens["query_pre"][row, :, 3:n].double()
            assert int(stats.tokens[row]) == max(n - 3, 0)
            mean = q.mean(1) if n > 3 else q.new_zeros(4, DIM)
            away = q - mean[:, None]
            covariance = away.mT @ away / max(n - 3, 1)
            assert (stats.mean[row] - mean).abs().max() < 1e-6
            assert (stats.covariance[row] - covariance).abs().max() < 1e-5
            at = torch.arange(n - 4, n)
            assert torch.equal(hidden_valid[row], at >= 0)
            wanted = tokens["hidden"][row, at.clamp(min=0)] * (at >= 0)[:, None]
            assert torch.equal(hidden[row], wanted)
            at = torch.arange(n - WINDOW, n)
            wanted = tokens["value"][row][:, at.clamp(min=0)] * (at >= 0)[:, None]
            assert torch.equal(values[row], wanted) and torch.equal(near[row], at >= 0)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))
        assert torch.equal(a[3], b[3]) and torch.equal(a[5], b[5])


def test_an_eviction_sees_what_it_asked_for():
    """Prompts in chunks, padded columns, candidates, single tokens, a crop, an aborted call."""
    data = Data(2, LONG)
    pipeline, state = start(data)
    prompt(pipeline, state, data, [2, 0])
    check(pipeline, state, data)
    prompt(pipeline, state, data, [BLOCK, 7])
    prompt(pipeline, state, data, [5, 2 * BLOCK], commit=False)
    check(pipeline, state, data)
    prompt(pipeline, state, data, [BLOCK + 9, 40])
    check(pipeline, state, data)
    state.sequences[0].prompt_open = state.sequences[1].prompt_open = False
    for _ in range(3):
        decode(pipeline, state, data)
    decode(pipeline, state, data, 8, skipped=(2, 7))
    check(pipeline, state, data)
    crop(state, [5, 3])
    data.at = [data.at[0] - 5, data.at[1] - 3]
    decode(pipeline, state, data, 4, commit=False)
    check(pipeline, state, data)
    decode(pipeline, state, data, 90, skipped=(0, 3))
    check(pipeline, state, data)


def test_statistics_of_one_call_are_those_of_any_other_to_the_last_bit():
    whole = Data(1, LONG)
    pipeline, state = start(whole)
    prompt(pipeline, state, whole, [LONG - 40])
    state.sequences[0].prompt_open = False
    decode(pipeline, state, whole, 30)
    wanted = shown(pipeline, state)
    cut = Data(1, LONG)
    pipeline, other = start(cut)
    for n in (1, 300, 20, BLOCK - 40):
        prompt(pipeline, other, cut, [n])
    other.sequences[0].prompt_open = False
    while cut.at[0] < LONG - 10:
        decode(pipeline, other, cut)
    same(shown(pipeline, other), wanted)
    assert other.sequences[0].summed == 2 * BLOCK
    two = Data(1, LONG), Data(1, LONG, seed=1)
    both = Data(2, LONG)
    for index, layer in enumerate(both.layers):
        for name in layer:
            layer[name] = torch.cat([two[1].layers[index][name], two[0].layers[index][name]])
    pipeline, batch = start(both)
    prompt(pipeline, batch, both, [17, LONG - 10])
    for a, b in zip(shown(pipeline, batch), wanted, strict=True):
        assert all(torch.equal(x[1:], y) for x, y in zip(a[2], b[2], strict=True))


@pytest.mark.parametrize("length", [BLOCK + 4, BLOCK + SPEC.rollback, BLOCK + 2])
def test_tokens_that_are_taken_back_leave_no_trace(length):
    """Others come in their place, over the border of a block and beside columns of padding."""
    data = Data(2, LONG)
    pipeline, state = start(data)
    prompt(pipeline, state, data, [length, length - 8])
    for row in state.sequences:
        row.prompt_open = False
    crop(state, [7, 0])
    data.at[0] -= 7
    decode(pipeline, state, data, 9, skipped=(8,))
    crop(state, [2, SPEC.rollback])
    data.at = [data.at[0] - 2, data.at[1] - SPEC.rollback]
    check(pipeline, state, data)
    other = Data(2, LONG, seed=3)
    for layer, new in zip(data.layers, other.layers, strict=True):
        for name, tokens in layer.items():
            for row, at in enumerate(data.at):
                tokens[row][..., at:, :] = new[name][row][..., at:, :]
    while min(data.at) < length + SPEC.rollback + 3:
        decode(pipeline, state, data)
        check(pipeline, state, data)


def test_forks_rows_and_files_have_them(tmp_path):
    data = Data(2, LONG)
    pipeline, state = start(data)
    prompt(pipeline, state, data, [BLOCK + 70, 30])
    wanted = shown(pipeline, state)
    save(state, tmp_path / "cache", pipeline)
    back, _, _ = load(tmp_path / "cache", pipeline, SPEC)
    tell(pipeline, back, data)
    same(shown(pipeline, back), wanted)
    fork = select_rows(state, [1, 0, -1])
    prompt(pipeline, state, data, [BLOCK, 3])
    data.at = [data.at[0] - BLOCK, data.at[1] - 3]
    for a, b in zip(shown(pipeline, fork), wanted, strict=True):
        assert all(torch.equal(x[[1, 0]], y) for x, y in zip(a[2], b[2], strict=True))
        assert not a[2].covariance[2].any() and not a[2].tokens[2]
        assert a[7] is data.weight and a[8] == ROPE
    state.reset()
    data.at = [0, 0]
    prompt(pipeline, state, data, [2 * BLOCK, BLOCK + 30])  # over sums of other tokens
    check(pipeline, state, data)


def test_their_bytes_are_reported_and_planned():
    data = Data(2, LONG)
    pipeline, state = start(data)
    pages = BLOCK + 2 * SPEC.rollback + 64
    ring, sums, inputs = 4 * pages * DIM, 4 * DIM * (DIM + 1), (4 + SPEC.rollback) * HIDDEN
    report = pipeline.report(state)
    assert report.statistics == 2 * 2 * 4 * (ring + sums + inputs)
    plain = CachePipeline(window=WINDOW, backend="reference")
    assert report.total - plain.report(plain.init(SPEC, 2)).total == report.statistics
    assert "statistics of queries" in str(report)


def test_what_is_asked_for_must_be_brought_and_told():
    data = Data(1, LONG)
    pipeline = CachePipeline(eviction=Asking(), window=WINDOW, backend="reference")
    assert pipeline.reads == {"query_pre", "hidden", "output_weight", "rope"}
    with pytest.raises(ValueError, match="hidden: Asking reads .* CacheSpec"):
        pipeline.init(attrs.evolve(SPEC, hidden=None))
    state = pipeline.init(SPEC)
    x = {name: t[0][..., :7, :] for name, t in data.layers[0].items()}
    pipeline.begin(state, [7], "prompt")
    with pytest.raises(PhaseError, match=r"output projection of layer 0; .*tell\(state, layer"):
        pipeline.attend(state, 0, **x)
    for wrong in (data.weight[:2], data.weight.long(), data.weight.to("meta")):
        with pytest.raises(
            ValueError, match=r"output_weight: wanted floats \[4, 4, hidden\] on cpu, got "
        ):
            pipeline.tell(state, 0, output_weight=wrong, rope=ROPE)
    with pytest.raises(ValueError, match="rope: wanted at most 2 frequencies"):
        pipeline.tell(state, 0, rope=Rope(frequencies=(1.0, 0.5, 0.2)))
    with pytest.raises(TypeError, match="tell: wanted output_weight or rope, got weight"):
        pipeline.tell(state, 0, weight=data.weight)
    pipeline.tell(state, 0, output_weight=lambda: data.weight)
    with pytest.raises(PhaseError, match="how layer 0 turns"):
        pipeline.attend(state, 0, **x)
    pipeline.tell(state, 0, rope=None)
    for name, wrong, says in (
        ("query_pre", None, "query_pre: wanted queries before RoPE, which Asking reads, got None"),
        ("query_pre", x["query_pre"][:2], r"query_pre: wanted \[4, 7, 4\], got \[2, 7, 4\]"),
        ("hidden", None, "hidden: wanted attention inputs, which Asking reads, got None"),
        ("hidden", x["hidden"][:, :2], r"hidden: wanted \[7, 6\], got \[7, 2\]"),
    ):
        with pytest.raises(ValueError, match=says):
            pipeline.attend(state, 0, **x | {name: wrong})
    pipeline.attend(state, 0, **x)


def test_a_function_that_gives_the_wrong_weight_is_named():
    data = Data(1, LONG)
    pipeline, state = start(data)
    pipeline.tell(state, 1, output_weight=lambda: data.weight[0])
    prompt(pipeline, state, data, [80])
    with pytest.raises(ValueError, match="output_weight: wanted floats"):
        pipeline.end_prompt(state)
    assert pipeline.report(state).evicted == [[0, 0], [0, 0]]
