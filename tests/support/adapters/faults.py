"""Faults to put into a model or a policy, and what shows that nothing was left behind."""

from __future__ import annotations

import copy

import attrs
import torch

from kvpolicy import Eviction


def snapshot(model):
    """Everything about a model that attaching could change."""
    model._can_set_attn_implementation()  # transformers keeps the answer on the class
    hooks = [name for name in model.__dict__ if "hook" in name]
    found = {}
    for name, module in model.named_modules():
        found[name] = (
            {key: id(value) for key, value in module.__dict__.items()},
            {key: copy.copy(module.__dict__[key]) for key in hooks},
            {key: id(value) for key, value in vars(type(module)).items()},
        )
    return (
        found,
        copy.deepcopy(model.config.__dict__),
        copy.deepcopy(getattr(model, "generation_config", None)),
    )


def digest(cache):
    """Everything a cache holds that a later call can see."""
    state, found = cache.state, [cache.phase, list(map(str, cache.chunks))]
    if state is None:
        return found
    found += [
        [x.length, x.active, x.prompt_open, x.evicted_at, x.considered_at] for x in state.sequences
    ]
    found += state.devices.read()
    slots = [range(max(n - layer.window, 0), n) for layer in state.layers for n in state.lengths]
    for layer, rows in zip(
        state.layers, zip(*[iter(slots)] * state.batch, strict=True), strict=True
    ):
        for row, near in enumerate(rows):
            at = torch.tensor(list(near), dtype=torch.long) % layer.ring.slots
            found += [x[row][:, at].tolist() for x in layer.ring]
            for head, count in enumerate(layer.counts[row].tolist()):
                ids = layer.table[row, head, : -(-count // 4)]
                pages = state.ops.read_pages(layer.pool.pages, ids)
                found += [page.flatten(0, 1)[:count].tolist() for page in pages]
    return found


class Fault(Exception):
    pass


class Break:
    """Raises in the last layer once, at its `nth` call."""

    def __init__(self, model, nth=1, error=Fault):
        self.left, self.error = nth, error
        module = model.model.layers[-1].self_attn.o_proj
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *args):
        self.left -= 1
        if self.left == 0:
            self.handle.remove()
            raise self.error("broken on purpose")


@attrs.frozen(kw_only=True)
class Refusing(Eviction):
    """Fails when it should score sequences of `length` tokens."""

    length: int
    when: str = "decode"

    def score(self, view):
        if int(view.lengths.max()) == self.length:
            raise Fault("no score")
        return torch.zeros_like(view.valid, dtype=torch.float32)
