"""A round of each eviction over full layers, beside SnapKV's of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from ..budget import Tokens
from ..eviction import Eviction, SnapKV
from ..pipeline import CachePipeline
from ..rope import Rope
from .context import Bench, Case
from .eviction_policies import DEEPER, policies, sizes
from .rows import Goal, Row
from .snapkv import full_state, round_of

ROUNDS = 3
SMALL = 10_000  # stored tokens


def measured(bench: Bench, policy: Eviction, held: int, alike: bool) -> tuple[float, float]:
    """Milliseconds and megabytes of scratch of a round over all layers; the median of ROUNDS.

    With `alike` keys have a common direction, as those of models do.
    """
    layers, heads, kv_heads, dim = sizes(bench)
    pipeline = CachePipeline(eviction=policy, window=bench.pick(256, 16), backend="triton")
    rope = Rope(frequencies=tuple(1e4 ** (-f / (dim // 2)) for f in range(dim // 2)))
    weight = torch.zeros(heads, dim, heads * dim, dtype=bench.dtype, device=bench.device)
    found = []
    for _ in range(bench.pick(ROUNDS + 1, 1)):
        state = full_state(bench, pipeline, layers, heads, kv_heads, held)
        for layer in range(layers):
            pipeline.tell(state, layer, rope=rope, output_weight=weight)
        for row in state.sequences:  # as if a replay had just been
            row.replayed_at = row.length
        for k, *_ in state.layers[0].pool.extents if alike else ():
            k += 1.5
        found.append(round_of(bench, state))
        del state
    times, scratch = zip(*(found[1:] or found), strict=True)  # the first one compiles
    return statistics.median(times), max(scratch) / 1e6


def one(bench: Bench, name: str, held: int) -> Iterator[Row]:
    """Whole rounds of a policy, on keys without and with a common direction."""
    budget = Tokens(bench.pick(held // 2, 64))
    key = "evictions", held
    if key not in bench.shared:
        own = SnapKV(budget=budget, observation=bench.pick(256, 16))
        bench.shared[key] = measured(bench, own, held, False)[0]
    snapkv = bench.shared[key]
    for alike in (False, True) if name == "RKV" else (False,):
        ms, scratch = measured(bench, policies(bench)[name](budget), held, alike)
        goals: tuple[Goal, ...] = ()
        beside = Goal(what="of SnapKV", wanted=2, got=ms / snapkv)
        if held < SMALL:  # where the host's calls are what is timed
            goals = (beside,) if name == "RKV" else ()
        elif name == "RKV":
            goals = (Goal(what="ms", wanted=1500, got=ms),)
        elif name not in DEEPER:
            goals = (beside,)
        what = ", keys alike" if alike else ""
        yield Row(
            group="evictions", name=f"{name}, {held} stored{what}", value=ms, goals=goals,
            floor=bench.floor_ms(moved=_bytes(bench, held)),
            baseline=f"SnapKV {snapkv:.1f} ms", note=f"{scratch:.0f} MB of scratch",
        )  # fmt: skip


def _bytes(bench: Bench, held: int) -> float:
    """Those of all keys."""
    layers, _, kv_heads, dim = sizes(bench)
    return 2.0 * layers * kv_heads * dim * held


def cases(bench: Bench) -> list[Case]:
    found = []
    for place, held in enumerate(bench.pick((100_000, 4096), (120,))):
        for name in policies(bench):

            def run(b: Bench, name: str = name, held: int = held) -> Iterator[Row]:
                return one(b, name, held)

            title = f"{name}, {held}"
            found.append(Case(group="evictions", name=title, run=run, seconds=12, rank=60 + place))
    return found
