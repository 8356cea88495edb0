"""Parts of a cache in threads of one process, which hold different heads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import attrs
import torch

from tests.support.contract.driver import Run


class Meeting:
    """Where the parts meet; one that fails breaks it for the others."""

    def __init__(self, parts):
        self.parts, self.barrier = parts, threading.Barrier(parts, timeout=60)
        self.told, self.met = [None] * parts, [0] * parts

    def share(self, part, what):
        self.told[part] = what
        self.met[part] += 1
        self.barrier.wait()
        found = list(self.told)
        self.barrier.wait()
        return found


class Part:
    """One part's way to the others."""

    def __init__(self, meeting, part):
        self.meeting, self.part, self.parts = meeting, part, meeting.parts

    def numbers(self, own):
        found = self.meeting.share(self.part, list(own))
        assert len({len(x) for x in found}) == 1
        return found

    def heads(self, x):
        found = self.meeting.share(self.part, x)
        assert len({x.shape for x in found}) == len({x.dtype for x in found}) == 1
        return torch.cat(found, 1)


def split(spec, parts):
    """The spec of each part."""
    heads, kv_heads = spec.heads // parts, spec.kv_heads // parts
    return [
        attrs.evolve(
            spec, heads=heads, kv_heads=kv_heads, head_offset=n * kv_heads,
            all_kv_heads=spec.kv_heads,
        )
        for n in range(parts)
    ]  # fmt: skip


def cut(streams, spec):
    """The part of streams that lies in the heads of a part's spec."""
    low, high = spec.head_offset, spec.head_offset + spec.kv_heads
    own, group = slice(low, high), slice(low * spec.group, high * spec.group)
    return [[(q[group], k[own], v[own], pre[own]) for q, k, v, pre in x] for x in streams]


def run_parts(pipelines, spec, streams, drive):
    """What `drive(run)` gives in each part, or its error."""
    meeting = Meeting(len(pipelines))

    def one(part, pipeline, own):
        try:
            exchange = Part(meeting, part)
            run = Run(pipeline, own, cut(streams, own), oracle=False, exchange=exchange)
            return run, drive(run)
        except Exception as error:
            meeting.barrier.abort()
            return None, error

    with ThreadPoolExecutor(len(pipelines)) as pool:
        found = pool.map(one, range(len(pipelines)), pipelines, split(spec, len(pipelines)))
        found = list(found)
    assert len(set(meeting.met)) == 1 or any(run is None for run, _ in found)
    return found
