"""Different policies on different layers, for the three slots."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import EvictionView
from kvpolicy.admission import Admission, AdmitAll, DuoAttention, LocalAttention, RandomGate
from kvpolicy.budget import Tokens, TotalCap
from kvpolicy.eviction import AtPromptEnd, Eviction, KeepAll, SnapKV
from kvpolicy.per_layer import per_layer
from kvpolicy.selection import Quest, SelectAll, Selection


@attrs.frozen(eq=False)
class Placed(Admission):
    """Counts how often it is placed."""

    log: list = attrs.field(factory=list)
    needs = frozenset({"hidden"})

    def admit(self, write):
        return torch.ones(write.key.shape[:2], dtype=torch.bool)

    def place(self, device, dtype, backend):
        self.log.append(backend)
        return Placed(log=self.log)


@attrs.frozen
class Norms(Selection):
    """A selection with a summary of its own."""

    budget: Tokens = Tokens(64)

    def summarize(self, keys, valid):
        return keys.norm(dim=-1)

    def score(self, query, summary, counts):
        return summary.sum(-1)[:, :, None]


@attrs.frozen
class LastQueries(Eviction):
    """Scores by the number of queries it was shown."""

    queries: int

    def score(self, view):
        assert view.query_valid.shape[1] == view.queries.shape[2]
        return torch.full_like(view.keys[..., 0], view.queries.shape[2])


def view_of(layer, queries):
    empty = torch.zeros(1, 1, 2, 4)
    flags = torch.ones(1, 1, 2, dtype=torch.bool)
    return EvictionView(
        layer=layer,
        keys=empty,
        values=empty,
        positions=torch.zeros(1, 1, 2, dtype=torch.long),
        valid=flags,
        marked=flags,
        recent_keys=empty,
        recent_valid=flags[0],
        lengths=torch.tensor([4]),
        scale=1.0,
        queries=torch.zeros(1, 1, queries, 4),
        query_valid=torch.ones(1, queries, dtype=torch.bool),
    )


def test_each_layer_gets_its_policy():
    first, second, third = Quest(budget=1), Quest(budget=2), Quest(budget=3)
    policy = per_layer(first, {range(2, 6, 2): second, 5: third})
    assert [policy.at(n) for n in range(7)] == [first, first, second, first, second, third, first]
    assert isinstance(policy, Selection)


def test_nested_policies_resolve():
    inner = per_layer(RandomGate(sparsity=0.1), {3: RandomGate(sparsity=0.3)})
    policy = per_layer(inner, {0: AdmitAll()})
    assert [policy.at(n).neutral for n in range(3)] == [True, False, False]
    assert policy.at(3).sparsity == 0.3


def test_admissions_decide_by_layer(make_write):
    policy = per_layer(LocalAttention(window=8, sinks=2), {1: AdmitAll()})
    assert policy.admit(make_write(tokens=4, layer=0)).sum().item() == 3 * 2
    assert policy.admit(make_write(tokens=4, layer=1)).all()
    assert policy.window == 8
    assert not policy.neutral
    assert per_layer(AdmitAll(), {0: AdmitAll()}).neutral
    assert per_layer(AdmitAll(), {0: Placed()}).needs == {"hidden"}


def test_a_shared_member_is_placed_once():
    shared, other = Placed(), Placed()
    policy = per_layer(shared, {0: other, 1: shared, range(2, 4): other})
    placed = policy.place(torch.device("cpu"), torch.float32, "reference")
    assert (shared.log, other.log) == (["reference"], ["reference"])
    assert placed.at(0) is placed.at(2)
    assert placed.at(0) is not other
    assert placed.at(1) is placed.at(9)


def test_selections_share_a_summary():
    policy = per_layer(SelectAll(), {2: Quest(budget=64), 3: Quest(budget=128, last=0)})
    keys, valid = torch.rand(3, 8, 4), torch.ones(3, 8).bool()
    wanted = Quest(budget=64).summarize(keys, valid)
    assert torch.equal(policy.summarize(keys, valid), wanted)
    assert [policy.at(n).neutral for n in range(4)] == [True, True, False, False]
    assert not policy.neutral
    assert policy.at(3).pages(32, 16) == 6
    with pytest.raises(TypeError, match=r"at\(layer\)\.score"):
        policy.score(keys, keys, valid)
    with pytest.raises(TypeError, match=r"at\(layer\)\.pages"):
        policy.pages(32, 16)
    with pytest.raises(ValueError, match=r"of one class, got \['Norms', 'Quest'\]"):
        per_layer(Quest(budget=64), {0: Norms()})
    assert per_layer(SelectAll(), {0: SelectAll()}).summarize(keys, valid).shape == (3, 0)


def test_evictions_act_by_layer(make_write):
    policy = per_layer(
        SnapKV(budget=64, observation=7, when="decode"),
        {0: KeepAll(), 1: AtPromptEnd(LocalAttention(window=9, sinks=2))},
    )
    assert (policy.queries, policy.when, policy.window) == (7, "decode", 9)
    assert [policy.at(n).when for n in range(3)] == ["prompt_end", "prompt_end", "decode"]
    assert policy.mark(make_write(layer=0)) is None
    assert policy.mark(make_write(tokens=5, layer=1)).sum().item() == 3 * 2
    assert not policy.neutral
    assert per_layer(SnapKV(budget=64), {0: KeepAll()}).when == "prompt_end"
    placed = policy.place(torch.device("cpu"), torch.float32, "reference")
    assert placed == policy


def test_evictions_see_the_queries_they_want():
    policy = per_layer(LastQueries(2), {1: LastQueries(5), 2: KeepAll()})
    assert policy.queries == 5
    assert policy.score(view_of(0, 5)).unique().tolist() == [2]
    assert policy.score(view_of(1, 5)).unique().tolist() == [5]
    assert policy.score(view_of(2, 5)).unique().tolist() == [0]


def test_total_cap_spans_layers():
    with pytest.raises(ValueError, match=r"layers: TotalCap\(tokens=99.*counts over all layers"):
        per_layer(KeepAll(), {0: SnapKV(budget=TotalCap(99))})


@pytest.mark.parametrize(
    ("default", "layers", "error", "message"),
    [
        (AdmitAll(), {0: SelectAll()}, TypeError, "layers: wanted Admission, got SelectAll"),
        (SelectAll(), {0: AdmitAll()}, TypeError, "layers: wanted Selection, got AdmitAll"),
        (KeepAll(), {0: AdmitAll()}, TypeError, "layers: wanted Eviction, got AdmitAll"),
        ("x", {}, TypeError, "default: wanted an admission, a selection or an eviction, got 'x'"),
        (AdmitAll(), {"0": AdmitAll()}, TypeError, "layers: wanted ints or ranges .*'0'"),
        (AdmitAll(), {True: AdmitAll()}, TypeError, "layers: wanted ints or ranges .*True"),
        (AdmitAll(), {-1: AdmitAll()}, ValueError, "layers: wanted layers counted from 0, got -1"),
        (AdmitAll(), {range(2, -2, -1): AdmitAll()}, ValueError, "layers: wanted .*from 0"),
        (AdmitAll(), {range(4, 4): AdmitAll()}, ValueError, "layers: wanted .*range\\(4, 4\\)"),
        (
            AdmitAll(),
            {range(0, 4): AdmitAll(), 3: AdmitAll()},
            ValueError,
            "layers: layer 3 has two policies",
        ),
        (
            LocalAttention(window=4),
            {0: LocalAttention(window=5)},
            ValueError,
            r"layers: the policies' windows disagree: \[4, 5\]",
        ),
        (
            AtPromptEnd(LocalAttention(window=4)),
            {0: AtPromptEnd(LocalAttention(window=5))},
            ValueError,
            r"layers: the policies' windows disagree: \[4, 5\]",
        ),
    ],
)
def test_wrong_layers_are_named(default, layers, error, message):
    with pytest.raises(error, match=message):
        per_layer(default, layers)


@pytest.mark.parametrize("slot", [AdmitAll(), SelectAll(), KeepAll()])
def test_unknown_layers_are_named(slot):
    policy = per_layer(slot, {range(2, 8, 3): slot})
    policy.check(6, 2, 64)
    with pytest.raises(ValueError, match=r"range\(2, 8, 3\) goes beyond the model's 5 layers"):
        policy.check(5, 2, 64)
    with pytest.raises(ValueError, match="goes beyond the model's 4 layers"):
        per_layer(slot, {range(4, -1, -1): slot}).check(4, 2, 64)


def test_members_are_checked():
    policy = per_layer(AdmitAll(), {0: DuoAttention(full_heads=((True,),) * 3)})
    with pytest.raises(ValueError, match="layers=3, the model has layers=4"):
        policy.check(4, 1, 64)


def test_per_layer_is_a_value():
    policy = per_layer(AdmitAll(), {1: LocalAttention()})
    assert policy == per_layer(AdmitAll(), {range(1, 2): LocalAttention()})
    assert len({policy, per_layer(AdmitAll(), {1: LocalAttention()})}) == 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        policy.default = AdmitAll()
