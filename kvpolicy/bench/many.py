"""Many requests: mixtures of prompts at once and as they arrive, through `generate_many`."""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import attrs
import torch

from ..budget import Tokens
from ..errors import BackendError
from ..eviction import SnapKV
from ..pipeline import CachePipeline
from .context import Bench, Case
from .model import SHAPES, Setting, build, pipeline_of
from .rows import Row

CAP = 4096  # tokens a head that SnapKV leaves
RATE = 0.6  # arrivals a second
WARM = 2  # requests beforehand, of each traffic's own kind
PERCENTILES = (50, 95, 99)


@attrs.frozen(kw_only=True)
class Traffic:
    """Requests: the lengths of their prompts and `new` tokens each, `rate` of arrivals a second.

    Without a rate all are there at the start. `tokens` of prompts go between two steps.
    """

    name: str
    lengths: tuple[int, ...]
    new: int = 128
    rate: float | None = None
    slots: int
    tokens: int = 16_384
    seconds: float

    def __str__(self) -> str:
        when = "at once" if self.rate is None else f"{self.rate} arrivals/s"
        return f"{self.name} + {self.new} each, {when}"


def mixture(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths that other engines were measured with (seed 1)."""
    rng = random.Random(1)
    return tuple(rng.randint(low, high) for _ in range(count))


MIX = functools.partial(Traffic, name="32 of 4K-60K", lengths=mixture(32, 4000, 60_000), slots=32)
PLAN = (
    ("gate", MIX(seconds=90)),
    ("gate + SnapKV", MIX(seconds=90)),
    ("dense", MIX(seconds=120)),
    ("gate", MIX(rate=RATE, tokens=1024, seconds=150)),
    ("gate", Traffic(name="16 of 32K", lengths=(32_000,) * 16, slots=16, seconds=50)),
    # So many new tokens that the first still decodes when the last begins.
    ("gate", Traffic(name="45 of 32K", lengths=(32_000,) * 45, new=256, slots=45, seconds=90)),
    ("gate", MIX(new=512, seconds=110)),
    ("gate", MIX(new=1024, seconds=130)),
    ("gate", Traffic(name="256 of 1K-8K", lengths=mixture(256, 1000, 8000), slots=64, seconds=120)),
)


@attrs.define
class Served:
    """What a traffic cost: seconds, and of each request its arrival and its tokens' times."""

    total: float
    arrived: list[float]
    times: list[list[float]]
    at_once: int
    parked: int
    peak: int
    decoding: str

    @property
    def first(self) -> list[float]:
        """Times to the first token, s."""
        return [times[0] - at for times, at in zip(self.times, self.arrived, strict=True)]

    @property
    def between(self) -> list[float]:
        """Times between two tokens of a request, ms."""
        return [1e3 * (b - a) for times in self.times for a, b in pairwise(times)]


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The smallest values that so many percent do not exceed."""
    ordered = sorted(values) or [0.0]
    return {p: ordered[max(-(-p * len(ordered) // 100) - 1, 0)] for p in PERCENTILES}


def cases(bench: Bench) -> Iterator[Case]:
    """One for each policy and traffic."""
    # Tiny shapes of the others are the same.
    for number, (policy, traffic) in enumerate(bench.pick(PLAN, PLAN[:4])):
        yield Case(
            group="many",
            name=f"{policy}, {traffic}",
            run=functools.partial(rows, policy=policy, traffic=traffic),
            seconds=traffic.seconds,
            rank=60 + number,
        )


def rows(bench: Bench, policy: str, traffic: Traffic) -> Iterator[Row]:
    """Total, requests and tokens a second, times to the first token and between tokens."""
    if bench.quick:
        traffic = attrs.evolve(
            traffic, lengths=tuple(8 + n % 24 for n in traffic.lengths[:4]), new=4, slots=3,
            rate=traffic.rate and 50.0, tokens=16,
        )  # fmt: skip
    served = serve(bench, policy, traffic)
    count, new = len(traffic.lengths), traffic.new
    first, between = percentiles(served.first), percentiles(served.between)
    name = f"{policy}, {traffic}"
    about = {"policy": policy, "slots": traffic.slots, "tokens_per_call": traffic.tokens}
    yield Row(
        group="many",
        name=f"{name}: total",
        shape=f"{count} prompts, {sum(traffic.lengths)} tokens",
        value=served.total,
        unit="s",
        rate=count * new / served.total,
        rate_unit="new tok/s",
        note=f"{served.at_once} at once, {served.parked} parked, {served.decoding}, "
        f"{served.peak / 1e9:.1f} GB at most",
        extra=about
        | {
            "requests_per_s": count / served.total,
            "tokens_per_s": (sum(traffic.lengths) + count * new) / served.total,
            "at_once": served.at_once,
            "parked": served.parked,
            "peak_bytes": served.peak,
            "decoding": served.decoding,
        },
    )
    for what, unit, found in (("TTFT", "s", first), ("between tokens", "ms", between)):
        yield Row(
            group="many",
            name=f"{name}: {what}",
            value=found[50],
            unit=unit,
            note=", ".join(f"p{p} {value:.4g}" for p, value in found.items()),
            extra=about | {f"p{p}": value for p, value in found.items()},
        )


def serve(bench: Bench, policy: str, traffic: Traffic) -> Served:
    """Serves a traffic once, after a few requests of its kind."""
    from ..adapters.hf import attach

    model = build(bench, SHAPES[0])
    pipeline = _pipeline(bench, policy, max(traffic.lengths) + traffic.new)
    with attach(model, pipeline, compile=not bench.quick) as attached:
        few = attrs.evolve(traffic, lengths=traffic.lengths[:WARM], rate=None, new=4)
        _serve(bench, attached, few)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return _serve(bench, attached, traffic)


def _pipeline(bench: Bench, policy: str, longest: int) -> CachePipeline:
    plain = "gate" if policy == "gate + SnapKV" else policy
    found = pipeline_of(bench, Setting(policy=plain, tokens=longest))
    if policy == plain:
        return found
    snapkv = SnapKV(budget=Tokens(bench.pick(CAP, 24)), observation=found.window)
    return attrs.evolve(found, eviction=snapkv)


def _serve(bench: Bench, attached: Any, traffic: Traffic) -> Served:
    from ..adapters.hf import Request

    rng = random.Random(0)
    words = attached.base.config.vocab_size
    due, at = [], 0.0
    for _ in traffic.lengths:
        at += 0.0 if traffic.rate is None else rng.expovariate(traffic.rate)
        due.append(at)
    prompts = [[rng.randrange(1, words) for _ in range(n)] for n in traffic.lengths]
    times: list[list[float]] = [[] for _ in traffic.lengths]
    start = time.perf_counter()

    def hear(heard: list[float], token: int) -> None:
        heard.append(time.perf_counter() - start)

    def source() -> Iterator[Any]:
        for number, ids in enumerate(prompts):
            while time.perf_counter() - start < due[number]:
                yield None
            yield Request(
                ids,
                id=number,
                max_new_tokens=traffic.new,
                do_sample=False,
                on_token=functools.partial(hear, times[number]),
            )

    options = {"slots": traffic.slots, "tokens_per_call": traffic.tokens}
    asked = source() if traffic.rate is not None else list(source())
    finished = list(attached.generate_many(asked, **options))
    total = time.perf_counter() - start
    if failed := next((x for x in finished if x.error is not None), None):
        raise failed.error
    if any(len(x.tokens) != traffic.new for x in finished) or len(finished) != len(prompts):
        raise BackendError("many: a request did not finish")
    return Served(
        total=total,
        arrived=due,
        times=times,
        at_once=_at_once(times),
        parked=sum(x.parked for x in finished),
        peak=torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0,
        decoding=attached.decoding,
    )


def _at_once(times: Sequence[Sequence[float]]) -> int:
    """The most requests that were between their first and their last token."""
    ends = sorted([(x[0], 1) for x in times] + [(x[-1], -1) for x in times])
    most = now = 0
    for _, step in ends:
        now += step
        most = max(most, now)
    return most
