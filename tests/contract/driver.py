"""Runs a pipeline and the oracle through the same calls and compares all that can be compared."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from contents import Held
from oracle import Oracle
from rules import evict


def stream(spec, length, seed):
    """Tokens of one sequence, `[layer] -> (q, k, v, key_pre)`, multiples of 1/64 in [-2, 2).

    Products and sums of these are exact in float32, so pages' scores do not depend on the order of
    summation and their ties are real ties.
    """
    rng = torch.Generator().manual_seed(seed)
    sizes = (spec.heads, spec.kv_heads, spec.kv_heads, spec.kv_heads)

    def draw(heads):
        whole = torch.randint(-128, 128, (heads, length, spec.head_dim), generator=rng)
        return (whole / 64).to(spec.dtype)

    return [tuple(draw(heads) for heads in sizes) for _ in range(spec.layers)]


def piece(tokens, start, stop):
    return [tuple(x[:, start:stop] for x in layer) for layer in tokens]


def random_cuts(rows, seed, longest):
    """Calls of random sizes, 0 included."""
    rng, left, calls = random.Random(seed), list(rows), []
    while any(left):
        now = [min(n, rng.randint(0, longest)) for n in left]
        left = [n - c for n, c in zip(left, now, strict=True)]
        if any(now):
            calls.append(now)
    return calls


def streams_of(sizes, rows, extra, seed):
    return [stream(sizes.spec, n + extra, 100 * seed + row) for row, n in enumerate(rows)]


def feed(run, rows, seed, longest):
    for cut in random_cuts(rows, seed, longest):
        run.prompt(cut)
    run.end_prompt()


class Run:
    """A cache beside one oracle per sequence and layer.

    `streams[row]` are that sequence's tokens and `at[row]` how many went in.
    """

    def __init__(self, pipeline, spec, streams, oracle=True):
        self.pipeline, self.spec, self.streams = pipeline, spec, streams
        self.state = pipeline.init(spec, len(streams))
        self.at = [0] * len(streams)
        self.pending, self.floor, self.checked = ([0] * len(streams) for _ in range(3))
        self.oracles = [self.new_row() if oracle else None for _ in streams]

    def new_row(self):
        return [Oracle(self.pipeline, self.spec, layer) for layer in range(self.spec.layers)]

    def copy(self, state):
        """The same sequences in another cache."""
        new = copy.copy(self)
        for name in ("at", "pending", "floor", "checked", "oracles"):
            setattr(new, name, copy.deepcopy(getattr(self, name)))
        new.state = state
        return new

    def prompt(self, counts, fail_at=None):
        """A prompt call; `fail_at` names the layer before which it breaks off."""
        self.maintain()
        self.pipeline.begin(self.state, counts, "prompt")
        spans = list(zip(self.streams, self.at, counts, strict=True))
        for layer in range(self.spec.layers):
            if layer == fail_at:
                raise InterruptedError
            parts = [piece(s, at, at + n)[layer] for s, at, n in spans]
            q, k, v, pre = (torch.cat(x, 1) for x in zip(*parts, strict=True))
            out = self.attend(layer, q, k, v, pre)
            if fail_at is None:
                outs = out.split(list(counts), 1)
                for row, (n, part, got) in enumerate(zip(counts, parts, outs, strict=True)):
                    if n:
                        self.compare(row, layer, got, "prompt", part)
        if fail_at is not None:
            raise InterruptedError
        self.pipeline.commit(self.state)
        self.advance(counts)
        if not self.pipeline.eviction.neutral:
            self.pending = [p or n > 0 for p, n in zip(self.pending, counts, strict=True)]

    def decode(self, valid=None, fail_at=None):
        """A decode call: a token for every sequence, or the real ones of `valid[row][column]`."""
        rows, named = range(len(self.streams)), valid is not None
        valid = valid if named else [[True]] * len(rows)
        mask = torch.tensor(valid)
        self.maintain()
        counts = [sum(v) if on else 0 for v, on in zip(valid, self.state.active, strict=True)]
        lengths = [sum(v) for v in valid]
        self.pipeline.begin(self.state, lengths, "decode", valid=mask if named else None)
        for layer in range(self.spec.layers):
            if layer == fail_at:
                raise InterruptedError
            columns = [self.columns(row, layer, valid[row]) for row in rows]
            q, k, v, pre = (torch.stack(x) for x in zip(*columns, strict=True))
            out = self.attend(layer, q, k, v, pre)
            if fail_at is None:
                self.compare_decode(layer, out, valid)
        if fail_at is not None:
            raise InterruptedError
        self.pipeline.commit(self.state)
        self.advance(counts)
        if not named:
            self.maintain()

    def maintain(self):
        """Evictions that are due: at once after single tokens, else before the next call."""
        step, policy = self.spec.interval, self.pipeline.eviction
        if self.spec.dtype != torch.float64:
            self.pipeline.maintain(self.state)  # what it kept decides the oracle's ties
        for row, at in enumerate(self.at):
            acts = policy.when == "decode" and not policy.neutral and self.state.active[row]
            if acts and not self.pending[row] and at // step > self.checked[row] // step:
                self.evict(row, decoding=True)

    def attend(self, layer, *tensors):
        """The pipeline's attention on its device, the result on the host."""
        q, k, v, pre = (x.to(self.spec.device) for x in tensors)
        return self.pipeline.attend(self.state, layer, q, k, v, key_pre=pre).cpu()

    def columns(self, row, layer, valid):
        """A row's tokens in its real columns and garbage in the others."""
        real, at = self.streams[row][layer], self.at[row]
        real = tuple(x[:, at : at + sum(valid)] for x in real)
        out = tuple(x.new_full((x.shape[0], len(valid), x.shape[2]), 77.0) for x in real)
        where = torch.tensor(valid).nonzero()[:, 0]
        for target, source in zip(out, real, strict=True):
            target[:, where[: source.shape[1]]] = source
        return out

    def compare_decode(self, layer, out, valid):
        for row, wanted in enumerate(valid):
            on, at = self.state.active[row], self.at[row]
            for column, real in enumerate(wanted):
                if not (real and on):
                    assert not out[row, :, column].any()
                    continue
                token = piece(self.streams[row], at, at + 1)[layer]
                self.compare(row, layer, out[row, :, column, None], "decode", token)
                at += 1
            if on and wanted[-1]:
                self.compare_selected(row, layer)

    def compare(self, row, layer, got, phase, token):
        assert not got.isnan().any()
        if self.oracles[row] is not None:
            oracle = self.oracles[row][layer]
            want = getattr(oracle, phase)(*token)
            budget = 2 * oracle.slack + max(2 * torch.finfo(self.spec.dtype).eps, 1e-13)
            assert (got.double() - want).abs().max() <= budget

    def compare_selected(self, row, layer):
        selected = self.state.layers[layer].selected
        if selected is None or self.oracles[row] is None:
            return
        oracle, size = self.oracles[row][layer], self.spec.page_size
        for h in range(self.spec.heads):
            pages = oracle.pages(h // self.spec.group)
            one = selected[row, h if selected.shape[1] == self.spec.heads else h // self.spec.group]
            assert one.max() * size < max(len(pages), 1)
            got = [j for p in one.tolist() if p >= 0 for j in pages[p * size : (p + 1) * size]]
            assert got == oracle.read[h], (row, layer, h)

    def advance(self, counts):
        self.at = [at + n for at, n in zip(self.at, counts, strict=True)]

    def end_prompt(self):
        self.pipeline.end_prompt(self.state)
        for row, pending in enumerate(self.pending):
            if pending:
                self.evict(row)
        self.pending = [0] * len(self.pending)

    def evict(self, row, decoding=False):
        self.checked[row] = self.at[row]

        def kept(layer, h):
            return set(self.state.kept(layer, row, h).tolist())

        exact = self.spec.dtype == torch.float64
        oracles = self.oracles[row]
        if oracles is not None and evict(oracles, decoding, None if exact else kept):
            self.floor[row] = self.at[row]

    def check(self):
        """Lengths, kept sets, evicted counts, pages and rings against the oracle, bit by bit."""
        assert self.state.lengths == self.at
        for values in self.state.lengths_on.values():
            assert values.tolist() == self.at
        for layer in range(self.spec.layers):
            held = Held(self.state, layer)
            for row, layers in enumerate(self.oracles):
                held.check(row, layers[layer])

    def check_report(self):
        """What the report says of tokens, against the oracles."""
        report, rows, tokens = self.pipeline.report(self.state), len(self.at), max(sum(self.at), 1)
        for layer, oracles in enumerate(zip(*self.oracles, strict=True)):
            heads = range(self.spec.kv_heads)
            near = sum(min(o.n, o.W) for o in oracles)
            stored = [(near + sum(len(o.pages(h)) for o in oracles)) / rows for h in heads]
            evicted = [sum(o.evicted[h] for o in oracles) for h in heads]
            admitted = [int(sum(o.alive[h].sum() for o in oracles)) + evicted[h] for h in heads]
            assert report.evicted[layer] == evicted
            if oracles[0].slides:
                assert report.admitted[layer] is None
            else:
                assert report.stored[layer] == pytest.approx(stored, rel=1e-9)
                if self.state.layers[layer].selected is None:
                    assert report.read[layer] == report.stored[layer]
                assert report.admitted[layer] == pytest.approx([n / tokens for n in admitted])

    def check_effect(self, selection=True):
        """Every policy that is not neutral did something, says the report."""
        report, pipe = self.pipeline.report(self.state), self.pipeline
        managed = [x for x in range(self.spec.layers) if x not in report.sliding_layers]
        assert max(self.at) > pipe.window + 2 * self.spec.page_size
        if not pipe.admission.neutral:
            assert report.mean_admitted < 1
        if not pipe.eviction.neutral:
            assert any(n for x in managed for n in report.evicted[x])
        assert pipe.selection.neutral or not selection or self.reads_less()

    def reads_less(self):
        """Whether the last decoded tokens left pages out."""
        report = self.pipeline.report(self.state)
        managed = [x for x in range(self.spec.layers) if x not in report.sliding_layers]
        stored = [sum(x) / len(x) for x in report.stored]
        return any(sum(report.read[x]) / len(report.read[x]) < stored[x] for x in managed)
