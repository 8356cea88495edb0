"""One pipeline serves caches in several threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import attrs
import torch

from kvpolicy import Admission, CacheSpec, RandomGate
from tests.support.contract.cases import Sizes, build
from tests.support.contract.driver import Run, feed, streams_of


@attrs.frozen(kw_only=True)
class Meets(Admission):
    """A random gate that decides when both threads are at the same layer."""

    barrier: threading.Barrier = attrs.field(eq=False)
    gate: Admission = RandomGate(sparsity=0.3)

    def admit(self, write):
        self.barrier.wait(30)
        return self.gate.admit(write)


def test_two_caches_of_one_pipeline():
    spec = CacheSpec(
        layers=2, heads=4, kv_heads=2, head_dim=8, page_size=4, interval=3, dtype=torch.float64
    )
    sizes = Sizes(spec, window=5)
    barrier = threading.Barrier(2)
    pipeline = build(sizes, "random", "quest_each", "tokens_decode")
    pipeline = attrs.evolve(pipeline, admission=Meets(barrier=barrier))

    def life(seed):
        try:
            live(seed)
        except BaseException:
            barrier.abort()  # nobody waits for a thread that failed
            raise

    def live(seed):
        run = Run(pipeline, spec, streams_of(sizes, [sizes.length], 8, seed))
        feed(run, [sizes.length], 1, 30)
        for _ in range(8):
            run.decode()
        run.check()
        run.check_effect()

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(life, seed) for seed in (1, 2)]:
            done.result()
