"""Inputs that make no sense: refused with what was wanted, the cache stays as it was."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import (
    Admission,
    CachePipeline,
    CacheSpec,
    Eviction,
    PhaseError,
    Quest,
    RandomGate,
    Selection,
    SnapKV,
    Tokens,
)

SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8, page_size=4, interval=4)
PIPELINE = CachePipeline(
    admission=RandomGate(sparsity=0.3),
    selection=Quest(budget=9),
    eviction=SnapKV(budget=20),
    window=5,
)


def inputs(phase="prompt", batch=1, tokens=30, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lead, length = ((), batch * tokens) if phase == "prompt" else ((batch,), 1)
    draw = lambda heads: torch.randn(*lead, heads, length, 8, generator=rng)  # noqa: E731
    return {"query": draw(4), "key": draw(2), "value": draw(2)}


def call(pipeline, state, phase="prompt", tokens=30, seed=0):
    pipeline.begin(state, [tokens] * state.batch, phase)
    data = inputs(phase, state.batch, tokens, seed)
    outs = [pipeline.attend(state, layer, **data) for layer in range(2)]
    pipeline.commit(state)
    return torch.stack(outs)


TENSORS = [
    ("query", lambda x: x[:3], ValueError, r"query: wanted \[4, 30, 8\], got \[3, 30, 8\]"),
    ("key", lambda x: x[:, 1:], ValueError, r"key: wanted \[2, 30, 8\], got \[2, 29, 8\]"),
    ("value", lambda x: x[..., :4], ValueError, r"value: wanted \[2, 30, 8\], got \[2, 30, 4\]"),
    ("query", lambda x: x[None], ValueError, r"query: wanted \[4, 30, 8\], got \[1, 4, 30, 8\]"),
    ("key", lambda x: x.half(), TypeError, "key: wanted torch.float32, got torch.float16"),
    ("value", lambda x: x.long(), TypeError, "value: wanted torch.float32, got torch.int64"),
    ("value", lambda x: x.to("meta"), ValueError, "value: wanted a tensor on cpu, got meta"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), TENSORS)
def test_tensors(name, change, error, message):
    state = PIPELINE.init(SPEC)
    PIPELINE.begin(state, [30], "prompt")
    data = inputs()
    with pytest.raises(error, match=message):
        PIPELINE.attend(state, 0, **data | {name: change(data[name])})
    PIPELINE.attend(state, 0, **data)  # the call is still good
    PIPELINE.abort(state)
    assert state.lengths == [0]


CALLS = [
    (([30], "prefill"), {}, ValueError, "phase: wanted one of prompt, decode, got 'prefill'"),
    (([30, 1], "prompt"), {}, ValueError, r"lengths: wanted 1 numbers from 0, got \[30, 1\]"),
    (([-1], "prompt"), {}, ValueError, "lengths: wanted 1 numbers from 0"),
    (([2], "decode"), {}, ValueError, r"valid: wanted for a decode call that adds \[2\], got None"),
    (([2], "decode"), {"valid": torch.ones(1, 3).bool()}, ValueError, r"names, \[3\], got \[2\]"),
    (
        ([2], "decode"),
        {"valid": torch.ones(1, 2)},
        ValueError,
        r"bools \[1, T\], got torch.float32",
    ),
    (([2], "decode"), {"valid": torch.ones(2).bool()}, ValueError, r"valid: wanted bools \[1, T\]"),
    (([2], "prompt"), {"valid": torch.ones(1, 2).bool()}, ValueError, "valid: prompt calls are"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), CALLS)
def test_calls(args, kwargs, error, message):
    state = PIPELINE.init(SPEC)
    with pytest.raises(error, match=message):
        PIPELINE.begin(state, *args, **kwargs)
    assert state.call is None
    call(PIPELINE, state)


def test_calls_out_of_order():
    state, data = PIPELINE.init(SPEC), inputs()
    with pytest.raises(PhaseError, match=r"attend: no call is open; call begin\("):
        PIPELINE.attend(state, 0, **data)
    with pytest.raises(PhaseError, match="commit: no call is open"):
        PIPELINE.commit(state)
    PIPELINE.abort(state)  # of nothing
    PIPELINE.begin(state, [30], "prompt")
    with pytest.raises(PhaseError, match="begin: a call is in flight"):
        PIPELINE.begin(state, [30], "prompt")
    with pytest.raises(PhaseError, match="end_prompt: a call is in flight"):
        PIPELINE.end_prompt(state)
    for layer in (2, -1):
        with pytest.raises(ValueError, match=f"layer: wanted one of 2 from 0, got {layer}"):
            PIPELINE.attend(state, layer, **data)
    PIPELINE.attend(state, 1, **data)
    with pytest.raises(PhaseError, match="layer 1 ran in this call already"):
        PIPELINE.attend(state, 1, **data)
    with pytest.raises(PhaseError, match=r"commit: layers \[0\] have not run"):
        PIPELINE.commit(state)
    PIPELINE.attend(state, 0, **data)
    PIPELINE.commit(state)
    with pytest.raises(PhaseError, match="call end_prompt"):
        PIPELINE.begin(state, [1], "decode")
    PIPELINE.end_prompt(state)
    PIPELINE.end_prompt(state)  # again: nothing is pending
    call(PIPELINE, state, "decode", 1)


def test_no_sequences():
    with pytest.raises(ValueError, match="batch: wanted at least 1, got 0"):
        PIPELINE.init(SPEC, 0)


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 6])
def test_prompts_around_the_window(tokens):
    """Empty prompts and prompts shorter than the window are prompts like others."""
    state = PIPELINE.init(SPEC, 2)
    out = call(PIPELINE, state, tokens=tokens)
    assert out.shape == (2, 4, 2 * tokens, 8) and not out.isnan().any()
    PIPELINE.end_prompt(state)
    assert not call(PIPELINE, state, "decode", 1).isnan().any()
    assert state.kept(0, 0, 0).tolist()[-1] == tokens


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_numbers_that_are_none_stay_in_their_sequence(name, value):
    """They are not looked for, which would make every step wait for the device."""
    pipeline = CachePipeline(selection=Quest(budget=9), eviction=SnapKV(budget=20), window=5)
    states = [pipeline.init(SPEC, 2) for _ in range(2)]
    for state, bad in zip(states, (None, value), strict=True):
        data = inputs(batch=2)
        if bad is not None:
            data[name][:, 12] = bad  # of the first sequence
        pipeline.begin(state, [30, 30], "prompt")
        outs = [pipeline.attend(state, layer, **data) for layer in range(2)]
        pipeline.commit(state)
        state.out = outs[0]
        pipeline.end_prompt(state)
        state.next = call(pipeline, state, "decode", 1, seed=3)
    good, bad = states
    assert torch.equal(good.out[:, 30:], bad.out[:, 30:])
    assert torch.equal(good.next[:, 1], bad.next[:, 1])
    assert torch.equal(good.kept(0, 1, 0), bad.kept(0, 1, 0))
    assert not bad.out[:, 12].isfinite().all()


@attrs.frozen(kw_only=True)
class Says(Admission):
    answer: object

    def admit(self, write):
        return self.answer(write)


@attrs.frozen(kw_only=True)
class Chooses(Selection):
    budget: Tokens = Tokens(9)
    summary: object = staticmethod(lambda keys, valid: keys.amax(1))
    answer: object = None

    def summarize(self, keys, valid):
        return self.summary(keys, valid)

    def score(self, query, summary, counts):
        return self.answer(query, summary)


@attrs.frozen(kw_only=True)
class Scores(Eviction):
    answer: object
    budget: Tokens = Tokens(9)

    def score(self, view):
        return self.answer(view)


ADMISSIONS = [
    (lambda w: w.key.sum(-1), "Says: wanted a bool tensor .*, got torch.float32"),
    (lambda w: w.key[:1, :, 0] > 0, r"Says: wanted a bool tensor \[2, 30\] .*\[1, 30\]"),
    (lambda w: [True], "Says: wanted a bool tensor .*, got list"),
]
SELECTIONS = [
    ({"summary": lambda k, v: k}, "Chooses.summarize: wanted floats"),
    ({"summary": lambda k, v: k.argmax(1)}, "Chooses.summarize: wanted floats .* got torch.int64"),
    ({"answer": lambda q, s: q[..., 0]}, "Chooses.score: wanted .*, got"),
]
EVICTIONS = [
    (lambda v: v.valid, TypeError, "Scores.score: wanted floats .*, got torch.bool"),
    (lambda v: None, TypeError, "Scores.score: wanted floats .*, got NoneType"),
    (lambda v: v.keys, ValueError, r"Scores.score: wanted floats \[1, 2, .*, 8\]"),
    (lambda v: v.keys[..., 0] / 0 * 0, ValueError, "Scores.score: .* without NaN, got NaN"),
]


@pytest.mark.parametrize(("answer", "message"), ADMISSIONS)
def test_admissions_that_make_no_sense(answer, message):
    pipeline = CachePipeline(admission=Says(answer=answer), window=5)
    state = pipeline.init(SPEC)
    pipeline.begin(state, [30], "prompt")
    with pytest.raises(ValueError, match=message):
        pipeline.attend(state, 0, **inputs())
    pipeline.abort(state)
    assert state.lengths == [0] and pipeline.report(state).pages == 0


@pytest.mark.parametrize(("how", "message"), SELECTIONS)
def test_selections_that_make_no_sense(how, message):
    pipeline = CachePipeline(selection=Chooses(**how), window=5)
    with pytest.raises(ValueError, match=message):
        state = pipeline.init(SPEC)
        call(pipeline, state)
        call(pipeline, state, "decode", 1)


@pytest.mark.parametrize(("answer", "error", "message"), EVICTIONS)
def test_evictions_that_make_no_sense(answer, error, message):
    pipeline = CachePipeline(eviction=Scores(answer=answer), window=5)
    state = pipeline.init(SPEC)
    call(pipeline, state)
    kept = state.kept(1, 0, 1)
    with pytest.raises(error, match=message):
        pipeline.end_prompt(state)
    assert torch.equal(state.kept(1, 0, 1), kept) and state.pending_end
