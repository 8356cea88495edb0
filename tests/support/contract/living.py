"""Living through random lives of a machine, and what compiled kernels need for it."""

from __future__ import annotations

import attrs
import torch
from hypothesis import Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.contract.caches import SPEC
from tests.support.contract.cases import ADMISSIONS, EVICTIONS
from tests.support.contract.lives import Life

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
KERNELS = {
    "spec": attrs.evolve(SPEC, head_dim=16, page_size=4, dtype=torch.float32, device=DEVICE),
    "window": 5,
    "backend": "triton",
    "phases": (Phase.generate,),  # shrinking would take hours
}
PAIRS = [(a, e) for a in ADMISSIONS for e in EVICTIONS]
STEPS = 14


def live(admission, eviction, count, **options):
    """`count` lives or more of a pair of policies, each selection beside them at least once.

    Returns what was done in each. Lives that do nothing but wait do not count.
    """
    start = PAIRS.index((admission, eviction))
    made = {"admission": admission, "eviction": eviction, "log": [], **options}
    steps, phases = made.pop("steps", STEPS), made.pop("phases", tuple(Phase))
    machine, log = type("OneLife", (made.pop("life", Life),), made), made["log"]
    while len(log) < count or (unseen := set(machine.selections) - {names[1] for names, _ in log}):
        missing = count - len(log)
        if missing <= 0:
            missing, machine.selections = 1, tuple(sorted(unseen))
        options = settings(max_examples=missing + 1, stateful_step_count=steps, phases=phases)
        run_state_machine_as_test(seed(start)(machine), settings=options)
        start += len(PAIRS)
    return log
