"""A policy of each slot and budgets that no file of the library knows, wherever one is asked."""

from __future__ import annotations

import dataclasses

import attrs
import pytest
import torch

from kvpolicy import (
    Adaptive,
    Admission,
    Budget,
    CachePipeline,
    CacheSpec,
    Eviction,
    Knob,
    Selection,
    Tokens,
    UnsupportedError,
    per_layer,
)
from kvpolicy.testing import check_admission, check_eviction, check_selection

WINDOW = 16


@attrs.frozen(kw_only=True)
class Grid(Admission):
    """Every `stride`-th token, whatever it holds."""

    stride: int = 2
    by_position = True

    def admit(self, write):
        return (write.positions % self.stride == 0).expand(write.key.shape[0], -1)

    def knob(self, pattern=None):
        return Knob(
            name="stride",
            at=lambda x: round(1 / max(x, 0.05)),
            set=lambda value: attrs.evolve(self, stride=int(value)),
        )


@attrs.frozen(kw_only=True)
class Mean(Selection):
    """Pages whose mean key fits the query; its budget may be a plain int."""

    budget: Tokens | int = 48

    def summarize(self, keys, valid):
        count = valid.sum(1, keepdim=True).clamp(min=1)
        return keys.masked_fill(~valid[..., None], 0).sum(1) / count

    def score(self, query, summary, counts):
        return query @ summary.transpose(2, 3)


@attrs.frozen(kw_only=True)
class Norms(Eviction):
    """Tokens with large keys stay; its budget may be a plain int."""

    budget: Budget | int = 40

    def score(self, view):
        return view.keys.norm(dim=-1)


@attrs.frozen
class Root(Budget):
    """`factor` times the square root of what was seen."""

    factor: float = 4.0

    def tokens_per_head(self, seen, layer, layers):
        return round(self.factor * seen**0.5)


@attrs.frozen
class OneOfTwo(Root):
    """Every other head keeps nothing but the window; its partner gets all."""

    shares_heads = True

    def targets(self, view):
        return [
            [[2 * n if h % 2 else 0 for h, n in enumerate(heads)] for heads in row]
            for row in Root.targets(self, view)
        ]


@attrs.frozen
class Halved(Root):
    """Keeps the half of what is stored, all layers together, as a budget over layers may."""

    spans_layers = True

    def targets(self, view):
        return [[[n // 2 for n in heads] for heads in row] for row in view.counts]


@dataclasses.dataclass(frozen=True)
class Plain(Eviction):
    """Options as fields of a frozen class of the standard library, without defaults too."""

    window: int
    queries: int
    budget: int = 40

    def score(self, view):
        return view.queries.mean((1, 2, 3))[:, None, None] + view.keys.norm(dim=-1)


def prompted(pipeline, tokens, spec=None):
    spec = spec or CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8, page_size=4)
    generator = torch.Generator().manual_seed(1)
    state = pipeline.init(spec)
    pipeline.begin(state, [tokens], "prompt")
    for layer in range(spec.layers):
        query, key = (torch.randn(h, tokens, 8, generator=generator) for h in (4, 2))
        pipeline.attend(state, layer, query, key, key)
    pipeline.commit(state)
    pipeline.end_prompt(state)
    return pipeline.report(state)


def test_the_kit_takes_them():
    check_admission(Grid())
    check_selection(Mean())
    check_eviction(Norms())
    check_eviction(Norms(budget=Root()))
    check_eviction(Norms(budget=OneOfTwo()))
    check_eviction(Norms(budget=Adaptive(Root())))
    check_eviction(Norms(budget=Halved()))


@pytest.mark.parametrize("slot", ["selection", "eviction"])
def test_a_plain_int_is_tokens(slot):
    """Also where a layer's policy has one, and it is checked when the pipeline is built."""
    policy = {"selection": Mean, "eviction": Norms}[slot]
    assert (
        prompted(CachePipeline(eviction=Norms(budget=40), window=WINDOW), 90).stored
        == [[40, 40]] * 2
    )
    CachePipeline(window=WINDOW, **{slot: policy(budget=17)})
    for wrong in (policy(budget=16), per_layer(policy(), {1: policy(budget=16)})):
        with pytest.raises(ValueError, match=rf"{policy.__name__}.budget: wanted .* 17 .*got 16"):
            CachePipeline(window=WINDOW, **{slot: wrong})
    for wrong in (True, 64.0, "64"):
        with pytest.raises(TypeError, match=rf"{policy.__name__}.budget: wanted a budget, got"):
            CachePipeline(window=WINDOW, **{slot: policy(budget=wrong)})


def test_options_are_attributes_of_any_kind():
    plain = Plain(window=8, queries=5)
    pipeline = CachePipeline(eviction=plain)
    assert (pipeline.window, plain.queries, plain.when, Plain.when) == (8, 5, *["prompt_end"] * 2)
    assert prompted(pipeline, 90).stored == [[40, 40]] * 2


def test_budgets_of_ones_own_hold():
    assert (
        prompted(CachePipeline(eviction=Norms(budget=Root()), window=WINDOW), 100).stored
        == [[40, 40]] * 2
    )
    uneven = prompted(CachePipeline(eviction=Norms(budget=OneOfTwo()), window=WINDOW), 100)
    assert uneven.stored == [[16, 64]] * 2
    halved = prompted(CachePipeline(eviction=Norms(budget=Halved()), window=WINDOW), 100)
    assert halved.stored == [[16 + 42] * 2] * 2


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"targets": lambda self, view: [[[1]]]},
            r"Wrong.targets: wanted ints .*got \[\[\[1\]\]\]",
        ),
        ({"targets": lambda self, view: [[[-1, 1]] * 2]}, "Wrong.targets: wanted ints"),
        ({"targets": lambda self, view: None}, "Wrong.targets: wanted ints .*got None"),
        ({"keep": lambda self, scores, *_: scores}, "Wrong.keep: wanted a bool tensor"),
        ({"keep": lambda self, scores, valid, *_: valid[:, :1]}, "Wrong.keep: wanted a bool"),
    ],
)
def test_what_a_budget_may_not_say(found, message):
    budget = attrs.frozen(type("Wrong", (Root,), found))()
    with pytest.raises(ValueError, match=message):
        prompted(CachePipeline(eviction=Norms(budget=budget), window=WINDOW), 100)


def test_a_shard_refuses_what_looks_across_heads():
    shard = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=8, all_kv_heads=4)
    CachePipeline(eviction=Norms(budget=Root()), window=WINDOW).check(shard)
    across = attrs.frozen(type("Across", (Norms,), {"across_heads": True}))()
    for eviction in (across, Norms(budget=OneOfTwo()), per_layer(Norms(), {1: across})):
        with pytest.raises(UnsupportedError, match="KV heads, but a tensor-parallel rank"):
            CachePipeline(eviction=eviction, window=WINDOW).check(shard)


def test_layers_cannot_hold_a_budget_over_layers():
    with pytest.raises(ValueError, match="Halved.* counts over all layers"):
        per_layer(Norms(), {1: Norms(budget=Halved())})


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("transformers")
    from kvpolicy.evaluation.models.tiny import tiny_llama

    return tiny_llama()


@pytest.mark.parametrize(
    "pipeline",
    [
        CachePipeline(admission=Grid(stride=3), window=WINDOW),
        CachePipeline(eviction=Norms(budget=40), window=WINDOW),
        CachePipeline(eviction=Norms(budget=Root()), window=WINDOW),
        CachePipeline(eviction=Norms(budget=OneOfTwo()), window=WINDOW),
        CachePipeline(admission=Grid(), eviction=Norms(budget=Halved()), window=WINDOW),
    ],
    ids=["admission", "int", "budget", "heads", "layers"],
)
def test_plans_are_exact(model, pipeline):
    from kvpolicy.adapters.hf import fit_report
    from kvpolicy.evaluation.search.calibrate import measure

    tokens = 120
    size = measure(model, pipeline, [torch.arange(tokens) % 500])
    assert fit_report(model, tokens, pipeline=pipeline).kept == pytest.approx(size.fraction)


@pytest.mark.parametrize(
    ("policies", "knob"),
    [
        ({"admission": Grid()}, "stride"),
        ({"eviction": Norms(budget=30)}, "budget"),
        ({"eviction": Norms(budget=Root())}, "budget's factor"),
        ({"eviction": Norms(budget=Adaptive(OneOfTwo()))}, "budget's factor"),
    ],
    ids=["admission", "int", "budget", "wrapped"],
)
def test_calibration_turns_them(model, policies, knob):
    from kvpolicy.evaluation.search.calibrate import calibrate

    pipeline = CachePipeline(window=WINDOW, **policies)
    found = calibrate(model, pipeline, [torch.arange(120) % 500], tokens=68, tolerance=0.05)
    assert found.knob == knob and found.reached
    name = next(iter(policies))
    assert type(getattr(found.pipeline, name)) is type(policies[name])


def test_a_policy_without_a_knob_is_named(model):
    from kvpolicy.evaluation.search.calibrate import calibrate

    plain = attrs.frozen(type("Plain", (Admission,), {"admit": Grid.admit, "stride": 2}))()
    with pytest.raises(ValueError, match=r"`knob` gives one\), got Plain, KeepAll"):
        calibrate(model, CachePipeline(admission=plain), [torch.arange(50)], tokens=30)


def test_a_front_of_both(model):
    from kvpolicy.evaluation.search.pareto import pareto
    from kvpolicy.evaluation.tasks.prompts import Example, Question

    ids = tuple(range(3, 103))
    examples = [Example(context_ids=ids, questions=(Question(ids[:5], ids[5:8]),))]
    pipeline = CachePipeline(admission=Grid(), eviction=Norms(budget=Root()), window=WINDOW)
    found = pareto(model, pipeline, examples, admissions=[1, 2], evictions=[None, 0.5])
    assert found.knobs == ("stride", "budget's factor")
    sizes = [x.fraction for x in found.points]
    assert sizes[0] == 1 and sizes[0] > sizes[2] > sizes[1] >= sizes[3]
