"""Admissions without weights, and their combinations."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy.admission import (
    Admission,
    AdmitAll,
    LocalAttention,
    RandomGate,
    all_of,
    any_of,
)


@attrs.frozen(kw_only=True)
class Every(Admission):
    """Admits every n-th position."""

    n: int
    window: int | None = None
    needs: frozenset[str] = frozenset()
    limit: int = 100

    def admit(self, write):
        return (write.positions % self.n == 0).expand(write.key.shape[0], -1)

    def check(self, layers, kv_heads, head_dim):
        if layers > self.limit:
            raise ValueError(f"limit {self.limit}")

    def place(self, device, dtype, backend):
        return attrs.evolve(self, limit=self.limit + 1)

    def at(self, layer):
        return attrs.evolve(self, limit=layer)


def test_admit_all_is_neutral(make_write):
    admitted = AdmitAll().admit(make_write(tokens=5, kv_heads=2))
    assert admitted.dtype == torch.bool
    assert admitted.shape == (2, 5)
    assert admitted.all()
    assert AdmitAll().neutral
    assert not RandomGate(sparsity=0.5).neutral


def test_local_attention_admits_sinks_by_position(make_write):
    local = LocalAttention(window=8, sinks=4)
    assert local.admit(make_write(tokens=6, kv_heads=2)).tolist() == [[True] * 4 + [False] * 2] * 2
    assert (
        local.admit(make_write(tokens=3, kv_heads=2, start=2)).tolist() == [[True, True, False]] * 2
    )
    assert not LocalAttention(window=8, sinks=0).admit(make_write()).any()
    shard = local.admit(make_write(tokens=6, kv_heads=4, heads=range(2, 4)))
    assert shard.shape == (2, 6)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.75, 1.0])
def test_random_gate_drops_the_named_fraction(make_write, sparsity):
    admitted = RandomGate(sparsity=sparsity).admit(make_write(tokens=4000, kv_heads=4, dim=1))
    assert admitted.dtype == torch.bool
    for row in admitted:  # five standard deviations of 4000 draws
        spread = 5 * (sparsity * (1 - sparsity) / 4000) ** 0.5
        assert abs(row.double().mean().item() - (1 - sparsity)) <= spread


def test_random_gate_does_not_depend_on_cut_or_shard(make_write, cut):
    gate, write = RandomGate(sparsity=0.5, seed=7), make_write(tokens=100, kv_heads=4, layer=3)
    whole = gate.admit(write)
    for size in (1, 7, 64):
        parts = [gate.admit(cut(write, n, min(n + size, 100))) for n in range(0, 100, size)]
        assert torch.equal(torch.cat(parts, 1), whole)
    shard = make_write(tokens=100, kv_heads=4, layer=3, heads=range(1, 3))
    assert torch.equal(gate.admit(shard), whole[1:3])


def test_random_gate_depends_on_seed_layer_and_head(make_write):
    draws = {
        (seed, layer, head): row
        for seed in (0, 1, -1, 1 << 40)
        for layer in (0, 1, 31)
        for head, row in enumerate(
            RandomGate(sparsity=0.5, seed=seed).admit(make_write(tokens=1000, dim=1, layer=layer))
        )
    }
    rows = list(draws.values())
    for n, row in enumerate(rows):
        for other in rows[:n]:
            # Independent rows agree on half of their tokens; six standard deviations.
            assert abs((row == other).double().mean().item() - 0.5) < 6 * 0.5 / 1000**0.5


def test_random_gate_shows_no_trend_over_positions(make_write):
    admitted = RandomGate(sparsity=0.5).admit(make_write(tokens=8000, kv_heads=2, dim=1))
    for row in admitted:
        repeats = (row[1:] == row[:-1]).double().mean().item()
        assert abs(repeats - 0.5) < 6 * 0.5 / 8000**0.5


def test_any_of_and_all_of_act_on_decisions(make_write):
    write = make_write(tokens=13, kv_heads=2)
    two, three = Every(n=2), Every(n=3)
    either, both = any_of(two, three).admit(write), all_of(two, three).admit(write)
    assert either[1].tolist() == [n % 2 == 0 or n % 3 == 0 for n in range(13)]
    assert both[1].tolist() == [n % 6 == 0 for n in range(13)]
    nested = any_of(all_of(two, three), Every(n=5)).admit(write)
    assert nested[0].tolist() == [n % 6 == 0 or n % 5 == 0 for n in range(13)]
    assert torch.equal(any_of(two).admit(write), two.admit(write))


def test_combined_neutrality():
    everything, some = AdmitAll(), Every(n=2)
    assert any_of(some, everything).neutral
    assert not all_of(some, everything).neutral
    assert all_of(everything, everything).neutral
    assert not any_of(some, some).neutral


def test_combined_windows_agree():
    assert any_of(Every(n=2), Every(n=3)).window is None
    assert all_of(Every(n=2), LocalAttention(window=9)).window == 9
    with pytest.raises(ValueError, match=r"windows disagree: \[8, 9\]"):
        any_of(LocalAttention(window=9), LocalAttention(window=8))


def test_combined_hands_on_what_members_need():
    first, second = (
        Every(n=2, needs=frozenset({"key_pre"})),
        Every(n=3, needs=frozenset({"hidden"})),
    )
    both = any_of(first, second)
    assert both.needs == {"key_pre", "hidden"}
    both.check(100, 1, 1)
    with pytest.raises(ValueError, match="limit 7"):
        all_of(first, attrs.evolve(second, limit=7)).check(8, 1, 1)
    placed = both.place(torch.device("cpu"), torch.float32, "reference")
    assert [p.limit for p in placed.policies] == [101, 101]
    assert [p.limit for p in both.at(5).policies] == [5, 5]


def test_combined_members_are_admissions():
    with pytest.raises(ValueError, match="policies: wanted at least one"):
        any_of()
    with pytest.raises(TypeError, match="policies: wanted admissions, got 'x'"):
        all_of(AdmitAll(), "x")


def test_admissions_are_values():
    assert LocalAttention(sinks=2) == LocalAttention(sinks=2)
    assert any_of(AdmitAll(), Every(n=2)) == any_of(AdmitAll(), Every(n=2))
    assert any_of(AdmitAll()) != all_of(AdmitAll())
    assert len({RandomGate(sparsity=0.5), RandomGate(sparsity=0.5), RandomGate(sparsity=0.4)}) == 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        LocalAttention().sinks = 1
