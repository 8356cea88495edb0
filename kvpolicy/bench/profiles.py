"""Where the time of a prompt and of a decode step goes, kernel by kernel."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch

from .context import Bench, Case
from .family_kernels import kernel_names
from .model import CHUNK, PROFILED, Setting, build, clean, pipeline_of, prefill, wait, warm_up
from .rows import Row

GATE = functools.partial(Setting, policy="gate")
PLAN = (
    GATE(tokens=100_000),
    GATE(tokens=400_000),
    GATE(tokens=32_000),
    GATE(tokens=32_000, batch=4),
)
SHARED = PLAN[:2]  # of several GPUs that share the heads
SHOWN = 0.001  # of the kernels' time, from which one is named
# What a kernel's name has in it, small letters; the first kind that fits.
_KINDS = {
    "NCCL": ("nccl",),
    "FlashAttention": ("flash",),
    "products": ("gemm", "gemv", "cutlass", "cublas", "nvjet", "splitk"),
    "compiled layers": ("triton_",),
    "copies": ("memcpy", "memset"),
}


def kind_of(kernel: str, own: frozenset[str]) -> str:
    """What a kernel belongs to; `own` are the names of this library's."""
    if kernel in own:
        return "the cache"
    small = kernel.lower()
    return next((x for x, parts in _KINDS.items() if any(p in small for p in parts)), "rest")


@attrs.frozen(kw_only=True)
class Spent:
    """Milliseconds of wall time, and of each kernel by its name."""

    wall: float
    kernels: Mapping[str, float]

    def by_kind(self) -> dict[str, float]:
        """Milliseconds of each kind of kernel, the longest first."""
        own, found = frozenset(kernel_names()), dict[str, float]()
        for name, ms in self.kernels.items():
            kind = kind_of(name, own)
            found[kind] = found.get(kind, 0.0) + ms
        return _longest_first(found)


def spent(bench: Bench, call: Callable[[], object], times: int = 1) -> Spent:
    """What one of `times` calls inside `call` takes; without a GPU torch's operations stand for
    kernels."""
    cuda, kinds = bench.device.type == "cuda", [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    wait(bench)
    start = time.perf_counter()
    call()
    wait(bench)
    wall = 1e3 * (time.perf_counter() - start) / times
    with torch.profiler.profile(activities=kinds, acc_events=True) as profile:
        call()
        wait(bench)
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found: dict[str, float] = {}
    for event in profile.key_averages():
        if event.device_type == device:
            taken = event.self_device_time_total if cuda else event.self_cpu_time_total
            found[event.key] = found.get(event.key, 0.0) + taken / 1e3 / times
    return Spent(wall=wall, kernels=_longest_first(found))


def _longest_first(found: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@torch.no_grad()
def rows(bench: Bench, setting: Setting) -> Iterator[Row]:
    """A prompt and a captured step of a setting: kernels by kind, and the longest by name."""
    from ..adapters.hf import attach

    model = build(bench, setting.shape)
    shape, chunk = (setting.batch, bench.pick(setting.tokens, 96)), bench.pick(CHUNK, 40)
    ids = torch.randint(1, model.config.vocab_size, shape, device=bench.device)
    with attach(model, pipeline_of(bench, setting), compile=not bench.quick) as attachment:
        warm_up(bench, setting, model, attachment, ids)
        held: list[Any] = [None, None]

        def prompt() -> None:
            held[0] = None  # one cache at a time
            held[0] = attachment.new_cache()
            held[1] = prefill(model, held[0], ids, chunk)

        yield _row(setting, "prompt", spent(bench, prompt), f"{shape[0]} x {shape[1]}")
        cache, token = held
        yield _row(setting, *_step(bench, model, cache, token))
        held.clear()
        del cache
    clean(bench)


def _step(bench: Bench, model: Any, cache: Any, token: torch.Tensor) -> tuple[str, Spent, str]:
    from ..adapters.hf.capture import Stepper

    position = torch.full_like(token[:, None], cache.columns)
    steps = bench.pick(PROFILED, 2)
    stepper = Stepper(model, cache, position, 2 * steps + 16)
    active = torch.ones(token.shape[0], dtype=torch.bool, device=bench.device)

    def decode(count: int) -> None:
        nonlocal token
        for _ in range(count):
            token = stepper.step(token, active)[:, -1].argmax(-1)

    decode(bench.pick(4, 1))  # eager steps, then capture
    found = spent(bench, lambda: decode(steps), steps)
    stepper.finish(extra=0)
    return "step", found, cache.decoding


def _row(setting: Setting, part: str, found: Spent, shape: str) -> Row:
    total, kinds = sum(found.kernels.values()), found.by_kind()
    named = {x: ms for x, ms in found.kernels.items() if ms > SHOWN * total}
    return Row(
        group="profile", name=f"{setting}: {part}", value=total, shape=shape,
        baseline=f"wall {found.wall:.4g} ms",
        note=", ".join(f"{kind} {ms:.3g}" for kind, ms in kinds.items()),
        extra={"wall": found.wall, "kinds": kinds, "kernels": named},
    )  # fmt: skip


def cases(bench: Bench) -> list[Case]:
    """One for each setting; of a few where several GPUs share the heads."""
    plan = PLAN if bench.ranks == 1 else SHARED
    settings = [attrs.evolve(x, ranks=bench.ranks) for x in bench.pick(plan, plan[:1])]
    return [
        Case(
            group="profile", name=f"profile of {x}", run=functools.partial(_case, x),
            seconds=25 + 12 * x.batch * x.tokens / 1e5 * (1 + x.tokens / 4e5), rank=95,
        )
        for x in settings
    ]  # fmt: skip


def _case(setting: Setting, bench: Bench) -> Iterator[Row]:
    return rows(bench, setting)
