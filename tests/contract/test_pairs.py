"""Every pair of policies of different slots works together and does something."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CacheSpec
from tests.support.contract.cases import ADMISSIONS, EVICTIONS, SELECTIONS, Sizes, build
from tests.support.contract.driver import Run, random_cuts, stream
from tests.support.contract.kinds import KINDS, first_met, meet

PAIRS = [
    *[(a, s, "none") for a in ADMISSIONS for s in SELECTIONS if "all" not in (a, s)],
    *[(a, "all", e) for a in ADMISSIONS for e in EVICTIONS if a != "all" and e != "none"],
    *[("all", s, e) for s in SELECTIONS for e in EVICTIONS if s != "all" and e != "none"],
]
SOME = {
    *[(a, s, "none") for a, s in meet("admission", "selection")],
    *[(a, "all", e) for a, e in first_met("admission", "eviction")],
    *[("all", s, e) for s, e in meet("selection", "eviction")],
}


@pytest.mark.parametrize(
    "one, other",
    [("admission", "selection"), ("admission", "eviction"), ("selection", "eviction")],
)
def test_every_policy_meets_each_kind(one, other):
    met = meet(one, other)
    assert len(set(met)) == len(met)
    for slot, mine, theirs in ((0, KINDS[one], KINDS[other]), (1, KINDS[other], KINDS[one])):
        for name in (name for names in mine.values() for name in names):
            beside = {pair[1 - slot] for pair in met if pair[slot] == name}
            assert all(beside & set(names) for names in theirs.values())


def turns(run, rows, decoded, seed):
    """Two turns of random cuts and single decoded tokens; the second prompt is short."""
    for cut in random_cuts(rows, seed, max(rows)):
        run.prompt(cut)
    run.end_prompt()
    for _ in range(decoded):
        run.decode()
    run.check()
    run.check_effect()
    run.prompt([5] * len(rows))
    run.end_prompt()
    run.decode()
    run.check()


@pytest.mark.parametrize(
    "admission, selection, eviction",
    [pytest.param(*pair, marks=() if pair in SOME else pytest.mark.slow) for pair in PAIRS],
)
def test_pair(admission, selection, eviction):
    spec = CacheSpec(
        layers=2, heads=6, kv_heads=2, head_dim=8, page_size=4, interval=8, dtype=torch.float64
    )
    sizes = Sizes(spec, window=6)
    pipeline = build(sizes, admission, selection, eviction)
    rows = [sizes.length, sizes.length + 7]
    streams = [stream(spec, n + 18, seed) for seed, n in enumerate(rows)]
    turns(Run(pipeline, spec, streams), rows, 12, seed=len(admission) + len(eviction))
