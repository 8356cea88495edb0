"""What ranks that decode captured steps must agree on, on GPUs or rehearsed on a CPU."""

from __future__ import annotations

import contextlib

import torch

from kvpolicy import CachePipeline
from kvpolicy.adapters.hf import attach, capture
from tests.support.adapters.models import SIZES, prompt
from tests.support.adapters.parallel import SecondHead, pipeline, told

NAMES = ("gate", "all", "gate-quest-snapkv", "adaptive", "total cap")


@contextlib.contextmanager
def eager():
    """Decodes eagerly inside."""
    whole, capture.why_not = capture.why_not, lambda *args: "asked"
    try:
        yield
    finally:
        capture.why_not = whole


def generated(model, name, tokens=24, sizes=SIZES, **options):
    """Tokens and logits of a decoding, how it ran, how often it was captured, and what was kept."""
    inputs = {k: v.to(model.device) for k, v in prompt([33, 21]).items()}
    with attach(model, pipeline(name), **sizes) as attached:
        cache = attached.new_cache()
        out = model.generate(
            **inputs, past_key_values=cache, max_new_tokens=tokens, return_dict_in_generate=True,
            output_logits=True, **{"do_sample": False, **options},
        )  # fmt: skip
    kept = [x.counts.tolist() for x in cache.state.layers]
    return out.sequences.cpu(), torch.stack(out.logits).cpu(), cache.decoding, cache.captures, kept


def agreed(model, rank):
    """By policy: whether captured is eager bit for bit, how it ran, and the tokens."""
    found = {}
    for name in NAMES:
        with eager():
            wanted = generated(model, name)
        got = generated(model, name)
        same = all(torch.equal(a, b) for a, b in zip(wanted[:2], got[:2], strict=True))
        found[name] = same and wanted[4] == got[4], wanted[2], got[2], got[3], got[0]
    torch.manual_seed(rank)
    found["sampled"] = generated(model, "gate", do_sample=True, top_k=0)[0]
    return found


def recaptured(model, rank):
    """Captures where buffers move on rank 1 alone, at each reservation of pages."""
    own = capture.Stepper._stale
    moved = []

    def stale(stepper):
        if rank == 1 and stepper.looked and len(moved) < 2:
            stepper.cache.state.moved()
            moved.append(1)
        return own(stepper)

    capture.Stepper._stale = stale
    try:
        return generated(model, "gate", 40)[2:4]
    finally:
        capture.Stepper._stale = own


class Breaks:
    """A processor, criterion or streamer that fails at the n-th token."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def __call__(self, ids, scores):
        self._count()
        return scores

    def put(self, value):
        self._count()

    def end(self):
        pass

    def _count(self):
        self.seen += 1
        if self.seen == self.at:
            raise ValueError("breaks")


class Goes(Breaks):
    """A criterion that stops nothing."""

    def __call__(self, ids, scores, **kwargs):
        self._count()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def failures(model, rank):
    """What is raised here where rank 0 or rank 1 fails while captured steps run."""
    found, ids = {}, prompt([33])["input_ids"].to(model.device)
    tail = prompt([5], seed=2)["input_ids"].to(model.device)
    ways = {
        "processor": lambda at: {"logits_processor": [Breaks(at)]},
        "criterion": lambda at: {"stopping_criteria": [Goes(at)]},
        "streamer": lambda at: {"streamer": Breaks(at)},
        "last token": lambda at: {"streamer": Breaks(31 if at < 99 else at)},
    }
    with attach(model, pipeline("gate"), **SIZES) as attached:
        cache = attached.read(ids)
        for name, way in ways.items():
            for who in (0, 1):
                options = way(9 if rank == who else 1000)
                raised = told(lambda o=options: attached.ask(cache, tail, max_new_tokens=30, **o))
                again = attached.ask(cache, tail, max_new_tokens=4)
                found[f"{name} on {who}"] = *raised, again.tolist()
    with attach(
        model, CachePipeline(admission=SecondHead(), window=5), max_tokens=60, **SIZES
    ) as a:
        cache = a.read(ids)
        found["cap"] = *told(lambda: a.ask(cache, tail, max_new_tokens=60)), []
    return found
