"""Inputs that make no sense: refused with what was wanted, the cache stays as it was."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import attrs
import pytest
import torch
from torch import nn

from kvpolicy import (
    Admission,
    CachePipeline,
    CacheSpec,
    DuoAttention,
    Eviction,
    PhaseError,
    Quest,
    RandomGate,
    Ratio,
    Selection,
    SnapKV,
    Tokens,
    WriteGate,
    attach,
    new_cache,
    save_pipeline,
)
from kvpolicy.adapters import hf
from kvpolicy.spec import Sizes, check_sizes

ROOT = Path(__file__).resolve().parents[1]

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


DTYPES = "wanted one of torch.float32, torch.float16, torch.bfloat16, torch.float64, got"
SPECS = [
    ({"dtype": "float32"}, TypeError, f"dtype: {DTYPES} 'float32'; write torch.float32$"),
    ({"dtype": None}, TypeError, f"dtype: {DTYPES} None"),
    ({"dtype": torch.int32}, ValueError, f"dtype: {DTYPES} torch.int32"),
    ({"device": "nonsense"}, ValueError, "device: wanted .* 'cpu' or 'cuda:0', got 'nonsense'"),
    ({"device": None}, TypeError, "device: wanted .*, got None"),
    ({"scale": "x"}, TypeError, "scale: wanted a finite number above 0, got 'x'"),
    ({"scale": "inf"}, TypeError, "scale: wanted a finite number above 0, got 'inf'$"),
    ({"scale": "2"}, TypeError, "scale: wanted a finite number above 0, got '2'; write 2$"),
    ({"scale": float("nan")}, ValueError, "scale: wanted a finite number above 0, got nan"),
    ({"rollback": 2.5}, TypeError, "rollback: wanted an int of at least 0, got 2.5$"),
    ({"rollback": True}, TypeError, "rollback: wanted an int of at least 0, got True"),
    ({"head_offset": 1.5}, TypeError, "head_offset: wanted an int of at least 0, got 1.5"),
    ({"sliding": (4.5, None)}, TypeError, "sliding: wanted an int of at least 1, got 4.5"),
    ({"sliding": (4,)}, ValueError, "sliding: wanted one entry for each of 2 layers, got 1"),
    ({"sliding": (0, 4)}, ValueError, "sliding: wanted at least 1, got 0"),
    ({"all_kv_heads": -3}, ValueError, "all_kv_heads: wanted at least 1, got -3"),
    ({"all_kv_heads": 1}, ValueError, r"all_kv_heads: wanted .* \+ kv_heads = 2, got 1"),
    ({"page_size": 12}, ValueError, "page_size: wanted a power of two, got 12"),
    ({"heads": 3}, ValueError, "heads: wanted a multiple of kv_heads=2, got 3"),
    ({"interval": 10**30}, ValueError, "interval: wanted at most 1,073,741,824, got 10000"),
]


@pytest.mark.parametrize(("sizes", "error", "message"), SPECS)
def test_sizes(sizes, error, message):
    with pytest.raises(error, match=message):
        attrs.evolve(SPEC, **sizes)


def test_words_are_sizes():
    """Of CacheSpec, with the types that it has for them."""
    wanted = get_type_hints(CacheSpec)
    assert get_type_hints(Sizes).items() <= wanted.items()
    check_sizes({"page_size": 4, "at_cap": "evict"})
    with pytest.raises(TypeError, match="pagesize: wanted one of .*; write page_size=3$"):
        check_sizes({"pagesize": 3})
    with pytest.raises(TypeError, match="max_byte: wanted one of .*; write max_bytes=9$"):
        check_sizes({"max_byte": 9})
    with pytest.raises(TypeError, match="wanted one of .*, got 'zebra'$"):
        check_sizes({"zebra": 9})


MODELS = [
    (lambda: attach("gpt2", PIPELINE), r"model: .*; load it: AutoModel.*from_pretrained\('gpt2'\)"),
    (
        lambda: new_cache("gpt2", PIPELINE),
        "model: wanted a model of transformers, got 'gpt2'; load",
    ),
    (lambda: hf.detach(None), "model: wanted a model of transformers, got None$"),
    (lambda: hf.spec_of(PIPELINE), r"model: wanted a model .*, got CachePipeline\("),
    (lambda: hf.fit_report("gpt2", 9), "config_or_model: .*; load it: AutoConfig.from_pretrained"),
    (lambda: attach(None, SnapKV(budget=9)), r"pipeline: .*; write CachePipeline\(eviction=SnapKV"),
    (lambda: new_cache(None, Quest(budget=9)), r"; write CachePipeline\(selection=Quest\("),
    (lambda: attach(None, "snapkv"), "pipeline: wanted a CachePipeline, got 'snapkv'$"),
    (lambda: attach(None, "a.yaml"), r"; write load_pipeline\('a.yaml'\)$"),
    (lambda: attach(None, [Quest(budget=9)]), r"; write CachePipeline\(selection=Quest\(...\)\)$"),
    (lambda: attach(None, [Quest(budget=9)] * 2), r"pipeline: wanted a CachePipeline, got \[.*\]$"),
    (lambda: attach(None, CachePipeline), r"the class CachePipeline; write CachePipeline\(...\)$"),
    (lambda: attach(None, Quest), "pipeline: wanted a CachePipeline, got the class Quest$"),
    (lambda: attach(PIPELINE, nn.Linear(2, 2)), "got a Linear; write the model first$"),
]


@pytest.mark.parametrize(("make", "message"), MODELS)
def test_models_and_pipelines(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_every_size_of_the_adapters_is_typed():
    found = [
        hf.attach,
        hf.Attachment.__init__,
        hf.new_cache,
        hf.load_cache,
        hf.fit_report,
        hf.spec_of,
    ]
    for function in [*found, hf.KVPolicyCache.__init__]:
        last = [*inspect.signature(function).parameters.values()][-1]
        assert last.kind is last.VAR_KEYWORD and last.annotation == "Unpack[Sizes]"


@pytest.mark.slow
def test_a_type_checker_sees_a_wrong_word(tmp_path):
    """One error for each line."""
    lines = [
        "SnapKV(budget=64, when='sometimes')",
        "SnapKV(budget='many')",
        "SnapKV(budget=64, pooling='sum')",
        "SnapKV(budget=64, group='each')",
        "SnapKV(budget=64, normalize='no')",
        "Quest(budget=None)",
        "Quest(budget=64, group='sum')",
        "CachePipeline(backend='cuda')",
        "CacheSpec(layers=1, heads=1, kv_heads=1, head_dim=1, at_cap='no')",
        "attach(model, pipeline, pagesize=3)",
        "attach(model, pipeline, at_cap='no')",
        "new_cache(model, pipeline, page_size='3')",
        "fit_report(model, 9, max_byte=3)",
        "pipeline.begin(state, [1], 'prefill')",
        "kvpolicy.atach",
    ]
    right = [
        "SnapKV(budget=64, when='decode')",
        "SnapKV(budget=Ratio(0.5))",
        "Quest(budget=64)",
        "attach(model, pipeline, page_size=4, max_bytes=None, at_cap='evict')",
        "pipeline.begin(state, [1], 'decode')",
    ]
    head = [
        "import kvpolicy",
        "from kvpolicy import *",
        "from kvpolicy.adapters.hf import fit_report",
        "from torch import nn",
        "def f(model: nn.Module, pipeline: CachePipeline, state: CacheState) -> None:",
    ]
    path = tmp_path / "wrong.py"
    body = [f"    {line}" for line in [*lines, *right]]
    path.write_text("\n".join([*head, *body]) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-version", "3.11", str(path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if "wrong.py" in line}
    assert found == set(range(len(head) + 1, len(head) + len(lines) + 1)), done.stdout


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
    (
        ([2], "prompt"),
        {"valid": torch.ones(1, 2).bool()},
        ValueError,
        "valid: wanted None for prompt calls",
    ),
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
    for batch in (True, 1.0, None):
        with pytest.raises(TypeError, match=f"batch: wanted an int of at least 1, got {batch}"):
            PIPELINE.init(SPEC, batch)


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


NUMBERS = [
    (lambda: Tokens("64"), TypeError, "tokens: wanted an int of at least 1, got '64'; write 64$"),
    (lambda: Tokens("6.5"), TypeError, "tokens: wanted an int of at least 1, got '6.5'$"),
    (lambda: Tokens("nan"), TypeError, "tokens: wanted an int of at least 1, got 'nan'$"),
    (lambda: Ratio("0.25"), TypeError, r"ratio: .*\(0, 1\], got '0.25'; write 0.25$"),
    (lambda: Ratio("half"), TypeError, r"ratio: wanted a number in \(0, 1\], got 'half'$"),
    (lambda: Ratio("2"), TypeError, r"ratio: wanted a number in \(0, 1\], got '2'$"),
    (lambda: Ratio(25), ValueError, "ratio: .*, got 25; write 0.25 for 25 %$"),
    (lambda: Ratio(1.5), ValueError, "ratio: .*, got 1.5$"),
    (lambda: Ratio(250), ValueError, "ratio: .*, got 250$"),
    (lambda: WriteGate("a.pt"), TypeError, r"; write WriteGate.from_pretrained\('a.pt'\)$"),
]


@pytest.mark.parametrize(("make", "error", "message"), NUMBERS)
def test_what_was_meant(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_folder_that_is_missing_is_named(tmp_path):
    folder = tmp_path / "none"
    with pytest.raises(FileNotFoundError, match=f"path: no folder {re.escape(str(folder))}; make"):
        save_pipeline(PIPELINE, folder / "a.json")
    assert not folder.exists()


MISSPELT = [
    (lambda: WriteGate.from_pretrained("smollm2-135m-instruct-w64-keep52"), "keep25"),
    (lambda: DuoAttention.from_pretrained("duo-smollm2-135m", sparsity=0.5), "duo-smollm2-135m-"),
]


@pytest.mark.parametrize(("read", "meant"), MISSPELT)
def test_a_misspelt_name_of_trained_weights(read, meant):
    with pytest.raises(FileNotFoundError, match=rf"names\(\) lists .*; write .*{meant}"):
        read()
