"""Piecewise graphs without a GPU: operations are recorded with their tensors, and run again."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvpolicy.adapters.hf import piecewise, short_prompts
from kvpolicy.adapters.hf.compile import CompiledLayers


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.ran.append((func, args, kwargs, out))
        return out


class Recorded:
    """In place of Graph: what ran between `begin` and `end` runs again, into the same tensors."""

    def __init__(self, pool):
        self.mode = _Recorder()

    def begin(self):
        self.mode.__enter__()

    def end(self):
        self.mode.__exit__(None, None, None)

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.mode.ran:
                for old, new in zip(
                    tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True
                ):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    @staticmethod
    @contextlib.contextmanager
    def capturing(device):
        yield

    @staticmethod
    def held(x):
        return x.detach()


@contextlib.contextmanager
def recorded():
    """Reads short prompts by recorded pieces inside, on any device."""
    whole = piecewise.Graph, short_prompts.why_not, short_prompts.new_pool, CompiledLayers.whole
    piecewise.Graph, short_prompts.new_pool = Recorded, lambda: None
    short_prompts.why_not = lambda attachment, decoder: None
    CompiledLayers.whole = lambda self: contextlib.nullcontext()  # dynamo runs in no dispatch mode
    try:
        yield
    finally:
        piecewise.Graph, short_prompts.why_not, short_prompts.new_pool, CompiledLayers.whole = whole
