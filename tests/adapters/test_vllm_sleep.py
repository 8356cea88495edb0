"""What a worker of vLLM's must have kept when it wakes from a sleep that gave its memory back."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import nn

from kvpolicy import Admission, CachePipeline, DuoAttention, Quest, RandomGate
from kvpolicy.adapters.vllm.row_layer import tensors_of
from tests.support.adapters.arenas import SPEC, Engine, Request
from tests.support.contract.cases import Sizes, gate

DUO = DuoAttention(full_heads=((True, False), (False, True)), sinks=3, window=20)
PIPELINES = {
    "duo": (CachePipeline(admission=DUO, selection=Quest(budget=64)), None),
    "random": (CachePipeline(admission=RandomGate(sparsity=0.5, seed=1), window=8), 1.0),
    "gate": (CachePipeline(admission=gate(Sizes(SPEC, 16)), window=16), 1.0),
}


def serve(engine, pipeline, seeds, spec=SPEC):
    engine.running = [Request(pipeline, 60, seed, spec) for seed in seeds]
    for counts in [(30, 25), (1, 1), (20, 1), (1, 1)]:
        batch = list(zip(engine.running, counts, strict=True))
        assert all(engine.room_for(request, n) for request, n in batch)
        engine.step(batch)
    for request in list(engine.running):
        engine.end(request)


def forget(rows, number):
    """Fills all that is not kept with what may stand in memory that was another's."""
    kept = {id(x) for x in rows.lasting()}
    layers = [[*x.ring, x.table, x.counts, x.known, x.queries] for x in rows.layers]
    own = [*vars(rows).values(), *rows.arenas, *rows.pages[:4], *sum(layers, [])]
    policies = [x for layer in rows.layers for x in tensors_of(layer.admission)]
    draw = torch.Generator().manual_seed(0)
    for tensor in [x for x in [*own, *policies] if isinstance(x, torch.Tensor)]:
        if id(tensor) in kept:
            continue
        if tensor.dtype.is_floating_point:
            tensor.fill_(number)
        elif tensor.dtype == torch.bool:
            tensor.fill_(True)
        else:
            tensor.random_(generator=draw)
    if rows.spec.dtype == torch.float64:  # the reference looks pages up before it leaves them out
        for layer in rows.layers:
            layer.table.remainder_(len(rows.pages.k))


@pytest.mark.parametrize("name", PIPELINES)
def test_requests_after_a_deep_sleep_are_served_as_before(name):
    pipeline, admitted = PIPELINES[name]
    engine = Engine(pipeline, rows=2, blocks=30, admitted=admitted)
    serve(engine, pipeline, (0, 1))
    forget(engine.rows, 1e3)
    assert engine.rows.starts.tolist() == [0, 1, 2, 3]  # policies may read it
    serve(engine, pipeline, (2, 3))
    assert engine.rows.count_refused() == 0


def test_kernels_read_nothing_that_was_not_written():
    spec = attrs.evolve(SPEC, dtype=torch.float32, head_dim=16, layers=1)
    streams = DuoAttention(full_heads=((True, False),), sinks=3, window=16)
    pipeline = CachePipeline(admission=streams, selection=Quest(budget=64), backend="triton")
    engine = Engine(pipeline, rows=2, blocks=12, spec=spec)
    forget(engine.rows, float("nan"))
    serve(engine, pipeline, (0, 1), spec)


def test_every_tensor_of_a_policy_is_found():
    """Of one of the library, and of classes of one's own, with modules or inside each other."""
    learned = gate(Sizes(SPEC, 16))
    weights = [x for x in attrs.astuple(learned, recurse=False) if isinstance(x, torch.Tensor)]
    assert len(weights) == 6 and {id(x) for x in weights} == {id(x) for x in tensors_of(learned)}

    class Own(Admission):
        def __init__(self, inner):
            self.net, self.parts = nn.BatchNorm1d(2), {"inner": [inner]}

        def admit(self, write):
            raise NotImplementedError

    found = {id(x) for x in tensors_of(Own(learned))}
    assert found > {id(x) for x in weights} and len(found) == 6 + 2 + 3
