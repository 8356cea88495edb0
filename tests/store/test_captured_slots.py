"""One captured step for all of a room's life: sequences enter, leave, wait and come back."""

from __future__ import annotations

import attrs
import pytest
import torch

from kvpolicy import H2O, CachePipeline, CacheSpec, Quest, RandomGate
from kvpolicy.store import clear, move, park, side_state, unpark
from tests.support.contract.contents import contents
from tests.support.contract.invariants import check_states
from tests.support.contract.snapshot import snapshot

SPEC = CacheSpec(layers=2, heads=4, kv_heads=2, head_dim=16, page_size=4, rollback=2, interval=4)
SLOTS, LONGEST = 3, 256
PIPELINES = {
    "gate": CachePipeline(admission=RandomGate(sparsity=0.4), selection=Quest(budget=12), window=3),
    "h2o": CachePipeline(eviction=H2O(budget=24), window=3),
}


class Room:
    """A room whose decode steps run by themselves, or by `captured`, a graph of one."""

    def __init__(self, pipeline, device, backend):
        self.pipeline = attrs.evolve(pipeline, backend=backend)
        self.state = self.pipeline.init(attrs.evolve(SPEC, device=device), SLOTS)
        self.state.finish(range(SLOTS))
        self.state.widen(LONGEST)
        self.side = side_state(self.state)
        self.inputs = [
            [torch.zeros(SLOTS, h, 1, 16, device=device) for h in (4, 2, 2)] for _ in range(2)
        ]
        self.captured, self.steps, self.pools = None, 0, backend == "reference"

    def enter(self, slot, tokens, seed):
        rng = torch.Generator().manual_seed(seed)
        self.pipeline.begin(self.side, [tokens], "prompt")
        for layer in range(2):
            new = (torch.randn(h, tokens, 16, generator=rng) for h in (4, 2, 2))
            self.pipeline.attend(self.side, layer, *(x.to(self.state.spec.device) for x in new))
        self.pipeline.commit(self.side)
        self.pipeline.end_prompt(self.side)
        move(self.state, slot, self.side, 0)

    def forward(self):
        self.pipeline.begin(self.state, [1] * SLOTS, "decode")
        for layer, tensors in enumerate(self.inputs):
            self.pipeline.attend(self.state, layer, *tensors)
        self.pipeline.commit(self.state, evict=False)

    def step(self):
        rng = torch.Generator().manual_seed(1000 + self.steps)
        self.steps += 1
        for x in (x for layer in self.inputs for x in layer):
            x.copy_(torch.randn(x.shape, generator=rng))
        if self.captured is None:
            self.forward()
            self.pipeline.maintain(self.state)
            return
        self.pipeline.prepare_replay(self.state, 8)
        assert self.moved() == self.before
        self.captured()
        self.pipeline.replayed(self.state)

    def moved(self):
        """Rises when a graph is no longer valid; the reference's pool moves when it grows."""
        return self.state.generation - self.pools * self.state.devices.generation

    def capture(self):
        """A graph, and on a CPU what stands for one: the device's part of a step."""

        def run():
            with self.state.rehearsal():
                self.forward()

        self.pipeline.prepare_replay(self.state, 8)
        self.before, self.captured = self.moved(), run
        if self.state.spec.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            self.captured = graph.replay


def life(room, capture=False):
    """Everything that a slot meets; what the sequences hold after each part."""
    found = []

    def look():
        room.state.sync_host()
        (host,) = snapshot([room.state])
        heads = [h for n in range(2) for row in range(SLOTS) for h in contents(host, n, row)]
        found.append([{name: x.tolist() for name, x in head.items()} for head in heads])
        found.append((host.lengths, host.active))

    def steps(count):
        for _ in range(count):
            room.step()

    room.enter(0, 40, seed=1)
    room.enter(2, 25, seed=2)
    steps(2)  # kernels compile before a capture
    if capture:
        room.capture()
    steps(5)
    look()
    room.enter(1, 60, seed=3)
    steps(3)
    room.pipeline.activate(room.state, torch.tensor([True, True, False]).to(room.state.spec.device))
    steps(2)  # the host does not know that one has ended
    clear(room.state, [2])
    look()
    waiting = park(room.state, 0)
    steps(4)
    move(room.state, 0, room.state, 1)
    room.enter(2, 9, seed=4)
    steps(3)
    look()
    unpark(room.state, 1, waiting)
    steps(6)
    look()
    check_states(room.pipeline, [room.state, room.side])
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_a_step_stays_valid(name):
    """Here the host alone is behind, as it is after a graph."""
    device = torch.device("cpu")
    rooms = [Room(PIPELINES[name], device, "reference") for _ in range(2)]
    assert life(rooms[0], capture=True) == life(rooms[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_graph_stays_valid(name):
    """No buffer moves, so one graph serves all, and each sequence gets what an eager one gets."""
    device = torch.device("cuda", torch.cuda.current_device())
    rooms = [Room(PIPELINES[name], device, "triton") for _ in range(2)]
    assert life(rooms[0], capture=True) == life(rooms[1])
