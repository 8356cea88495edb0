"""One rank of test_sharded: trains on weights that `fully_shard` splits, in several ways."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach, spec_of
from kvpolicy.cli.common import load
from kvpolicy.training import TrainingMix, train_duo_attention, train_judge, train_write_gate
from kvpolicy.training.data import Batch
from tests.support.training.small import make_model
from tests.support.two_ranks import met

LENGTH = 96
GATE = {
    "steps": 3, "window": 16, "lam": 0.1, "answer_share": 0.3, "eval_every": 3, "lr": 1e-2,
}  # fmt: skip
DUO = {"steps": 3, "sink_size": 2, "recent_size": 30}


class Rows(TrainingMix):
    """Sequences by number; a process that takes two has those that two processes take."""

    def __init__(self):
        object.__setattr__(self, "length", LENGTH)

    def batch(self, index, size, *, rank=0):
        first = size * max(rank, 0)
        ids = [self.row(2 * index + first + n) for n in range(size)]
        ids = torch.stack(ids)
        return Batch(ids, (torch.arange(LENGTH) >= 80).expand_as(ids).clone())

    def row(self, number):
        made = torch.Generator().manual_seed(number)
        return torch.randint(1, 128, (LENGTH,), generator=made)


def train(model, batch_size):
    """Gates, a pattern, and what the gates' steps said."""
    said = []
    gates = train_write_gate(model, Rows(), batch_size=batch_size, progress=said.append, **GATE)
    return gates, train_duo_attention(model, Rows(), batch_size=batch_size, **DUO), said


def layers_and_root(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def layers_and_decoder(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.model)
    return model


WAYS = {
    "layers and root": layers_and_root,
    "gathered again": lambda model: layers_and_root(model, reshard_after_forward=True),
    "one group": fully_shard,
    "layers and decoder": layers_and_decoder,
}


def weights(model):
    """A copy of the whole weights, gathered where they are split."""
    found = {}
    for name, value in model.state_dict().items():
        found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


def as_before(model, ids, logits, held):
    """Weights equal to the bit; products round by where a gathered buffer lies in memory."""
    kept = weights(model)
    close = torch.allclose(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
    return close and kept.keys() == held.keys() and all(torch.equal(kept[k], held[k]) for k in held)


def refusals(model):
    """What is said of a cache, of its sizes and of training that asks for attention maps."""
    found = []
    ids = torch.arange(1, 20)[None]
    for call in (
        lambda: attach(model, CachePipeline()),
        lambda: spec_of(model),
        lambda: train_judge(model, [(ids[0], ids[0, :5])], steps=1),
    ):
        try:
            call()
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    return found


def checked(folder):
    """What each way to split the weights gave, by name."""
    found, ids = {}, torch.arange(1, 20)[None]
    models = {name: way(make_model()) for name, way in WAYS.items()}
    models["command line"], _ = load(folder, "cpu", "float32", shard=True)
    for name, model in models.items():
        before, held = model(ids).logits.detach(), weights(model)
        gates, pattern, said = train(model, 1)
        again = as_before(model, ids, before, held)
        found[name] = gates.gates.state_dict(), gates.fingerprint, pattern.heads, said, again
    found["refused"] = refusals(model)
    return found


def main(folder, rank):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with met(f"{folder}/meet", rank):
        torch.save(checked(folder), Path(folder) / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
