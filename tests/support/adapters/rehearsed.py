"""Captured decoding without a GPU: a step that does on every replay what its graph would."""

from __future__ import annotations

import contextlib
import weakref

import torch

from kvpolicy.adapters.hf import capture, decode_loop


class Rehearsed:
    """In place of CapturedStep: runs the step as it is captured, the host's numbers left alone.

    `fails` says that capturing does, as where a model asks the device.
    """

    fails = False

    def __init__(self, model, cache, tokens, positions):
        self.model, self.cache = model, weakref.ref(cache)  # as a graph, which holds buffers alone
        self.generation, self.held = cache.state.generation, capture.HeldFast(model)
        if self.fails:
            raise RuntimeError("no capture")

    def replay(self, tokens, positions):
        cache = self.cache()
        assert self.generation == cache.state.generation
        cache.capturing = True
        try:
            with cache.ranks.capturing(), cache.state.rehearsal():
                return capture.run(self.model, cache, tokens, positions)
        finally:
            cache.capturing = False


class Passed:
    def synchronize(self):
        pass


def _send(self, alive, token, wrong):
    flags = torch.cat([self.steps.flags(alive).long(), wrong[None].long()])
    return flags, token.clone(), Passed()


@contextlib.contextmanager
def rehearsed():
    """Decodes so inside."""
    whole = capture.why_not, capture.CapturedStep, decode_loop._LateFlags._send
    capture.why_not, capture.CapturedStep = lambda *args: None, Rehearsed
    decode_loop._LateFlags._send = _send
    try:
        yield
    finally:
        capture.why_not, capture.CapturedStep, decode_loop._LateFlags._send = whole
        Rehearsed.fails = False
