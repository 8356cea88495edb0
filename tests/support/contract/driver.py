"""Runs a pipeline and the oracle through the same calls and compares all that can be compared."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch

from tests.support.contract.contents import Held
from tests.support.contract.snapshot import snapshot, to_device, to_host
from tests.support.contract.streams import hidden_of, piece, random_cuts, stream
from tests.support.contract.told import before, tell
from tests.support.oracle import Oracle
from tests.support.rules import evict


def streams_of(sizes, rows, extra, seed):
    return [stream(sizes.spec, n + extra, 100 * seed + row) for row, n in enumerate(rows)]


def feed(run, rows, seed, longest):
    for cut in random_cuts(rows, seed, longest):
        run.prompt(cut)
    run.end_prompt()


class Run:
    """A cache beside one oracle per sequence and layer.

    `streams[row]` are that sequence's tokens and `at[row]` how many went in, `sinks[layer]` the
    attention's sinks.
    """

    def __init__(self, pipeline, spec, streams, oracle=True, sinks=None, exchange=None):
        self.pipeline, self.spec, self.streams = pipeline, spec, streams
        self.sinks = sinks or [None] * spec.layers
        self.state = pipeline.init(spec, len(streams), exchange)
        tell(pipeline, self.state)
        self.at = [0] * len(streams)
        self.pending, self.floor, self.checked = ([0] * len(streams) for _ in range(3))
        self.oracles = [self.new_row() if oracle else None for _ in streams]
        self.middle = None  # where replays are cut, if not at half of the longest sequence

    def new_row(self):
        layers = enumerate(self.sinks)
        return [Oracle(self.pipeline, self.spec, layer, sinks) for layer, sinks in layers]

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
        parts = list(zip(*(piece(s, at, at + n) for s, at, n in spans), strict=True))
        outs, _ = self.attend(
            [[torch.cat(x, 1) for x in zip(*p, strict=True)] for p in parts], fail_at
        )
        for layer, out in enumerate(outs):
            news = zip(counts, parts[layer], out.split(list(counts), 1), strict=True)
            for row, (n, part, got) in enumerate(news):
                if n:
                    self.compare(row, layer, got, "prompt", part)
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
        inputs = []
        for layer in range(self.spec.layers):
            columns = [self.columns(row, layer, valid[row]) for row in rows]
            inputs.append([torch.stack(x) for x in zip(*columns, strict=True)])
        for layer, out in enumerate(zip(*self.attend(inputs, fail_at), strict=True)):
            self.compare_decode(layer, *out, valid)
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

    def attend(self, inputs, fail_at):
        """The pipeline's attention on its devices; what layers gave and selected, on the host."""
        if self.spec.devices:
            inputs = [to_device(x, on) for x, on in zip(inputs, self.spec.devices, strict=True)]
            tensors = iter([x for layer in inputs for x in layer])
        else:
            tensors = iter(to_device([x for layer in inputs for x in layer], self.spec.device))
        outs = []
        for layer in range(self.spec.layers):
            if layer == fail_at:
                raise InterruptedError
            q, k, v, pre = islice(tensors, 4)
            sinks = self.sinks[layer]
            sinks = None if sinks is None else sinks.to(self.spec.device_of(layer))
            given = {"key_pre": pre, "hidden": hidden_of(pre), "sinks": sinks}
            given["query_pre"] = before(q)
            outs.append(self.pipeline.attend(self.state, layer, q, k, v, **given))
        if fail_at is not None:
            raise InterruptedError
        selected = [x.selected for x in self.state.layers]
        if self.spec.device.type != "cpu":
            found = iter(to_host(outs + [x for x in selected if x is not None]))
            outs = list(islice(found, len(outs)))
            selected = [None if x is None else next(found) for x in selected]
        return outs, selected

    def columns(self, row, layer, valid):
        """A row's tokens in its real columns and garbage in the others."""
        real, at = self.streams[row][layer], self.at[row]
        real = tuple(x[:, at : at + sum(valid)] for x in real)
        out = tuple(x.new_full((x.shape[0], len(valid), x.shape[2]), 77.0) for x in real)
        where = torch.tensor(valid).nonzero()[:, 0]
        for target, source in zip(out, real, strict=True):
            target[:, where[: source.shape[1]]] = source
        return out

    def compare_decode(self, layer, out, selected, valid):
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
                self.compare_selected(row, layer, selected)

    def compare(self, row, layer, got, phase, token):
        assert not got.isnan().any()
        if self.oracles[row] is not None:
            oracle = self.oracles[row][layer]
            want = getattr(oracle, phase)(*token)
            budget = 2 * oracle.slack + max(2 * torch.finfo(self.spec.dtype).eps, 1e-13)
            assert (got.double() - want).abs().max() <= budget

    def compare_selected(self, row, layer, selected):
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

    def replay(self):
        """What a later part of each stream gives the first half of its tokens and the last ones."""
        if not any(self.pending) or not any(x.eviction.replayed for x in self.state.managed):
            return
        longest = max(self.at)
        middle = longest // 2 if self.middle is None else self.middle
        for span in (range(min(middle, longest)), range(middle, longest)):
            if not span:
                continue
            ends = [s[0][0].shape[1] for s in self.streams]
            rows = [piece(s, end - 7, end) for s, end in zip(self.streams, ends, strict=True)]
            parts = list(zip(*rows, strict=True))
            run = copy.copy(self)
            with self.pipeline.replay(self.state, span=span, sinks=2) as run.state:
                self.pipeline.begin(run.state, [7] * len(rows), "prompt")
                run.attend([[torch.cat(x, 1) for x in zip(*p, strict=True)] for p in parts], None)
                self.pipeline.commit(run.state)
            for row, layers in enumerate(self.oracles):
                for oracle, token in zip(layers or [], rows[row], strict=bool(layers)):
                    if oracle.eviction.replayed and not oracle.slides:
                        oracle.replay(*token, span, 2)

    def end_prompt(self):
        self.replay()
        self.pipeline.end_prompt(self.state)
        for row, pending in enumerate(self.pending):
            if pending:
                self.evict(row)
        self.pending = [0] * len(self.pending)

    def evict(self, row, decoding=False):
        self.checked[row], oracles = self.at[row], self.oracles[row]
        if oracles is None:
            return
        exact = self.spec.dtype == torch.float64
        host = None if exact else snapshot([self.state])[0]

        def kept(layer, h):
            return set(host.kept(layer, row, h).tolist())

        if evict(oracles, decoding, None if exact else kept):
            self.floor[row] = self.at[row]

    def check(self, host=None):
        """Lengths, kept sets, evicted counts, pages and rings against the oracle, bit by bit.

        `host` is a snapshot of the cache.
        """
        host = host or snapshot([self.state])[0]
        assert host.lengths == self.at
        assert host.devices.read()[0] == self.at
        for layer in range(self.spec.layers):
            held = Held(host, layer)
            for row, layers in enumerate(self.oracles):
                held.check(row, layers[layer])

    def check_report(self, report):
        """What the report says of tokens, against the oracles."""
        rows, tokens = len(self.at), max(sum(self.at), 1)
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
        self.check_snapshot(report)
        managed = [x for x in range(self.spec.layers) if x not in report.sliding_layers]
        assert max(self.at) > pipe.window + 2 * self.spec.page_size
        if not pipe.admission.neutral:
            assert report.mean_admitted < 1
        if not pipe.eviction.neutral:
            assert any(n for x in managed for n in report.evicted[x])
        assert pipe.selection.neutral or not selection or self.reads_less(report)
        tiled = [x for x in managed if pipe.selection.at(x).tile is not None]
        assert [x for x in managed if report.prompt_read[x] is not None] == tiled
        assert all(report.prompt_read[x] < 1 for x in tiled)
        return report

    def check_snapshot(self, report):
        """What the cache itself says on its device is what its snapshot says."""
        state, (host,) = self.state, snapshot([self.state])
        if host is state:
            return
        assert report == self.pipeline.report(host)
        for pool, held in zip(state.devices.pools, host.devices.pools, strict=True):
            ids = torch.arange(pool.capacity, dtype=torch.int32, device=pool.device)
            for read, want in zip(
                to_host(state.ops.read_pages(pool.pages, ids)), held.pages, strict=False
            ):
                assert torch.equal(read.view(torch.uint8), want.view(torch.uint8))
        assert state.kept(0, 0, 0).tolist() == host.kept(0, 0, 0).tolist()

    def reads_less(self, report):
        """Whether the last decoded tokens left pages out, where more than two are held."""
        managed = [x for x in range(self.spec.layers) if x not in report.sliding_layers]
        if (
            max(max(report.stored[x]) for x in managed)
            <= self.pipeline.window + 2 * self.spec.page_size
        ):
            return True  # no selection here reads less than the window and two pages
        stored = [sum(x) / len(x) for x in report.stored]
        return any(sum(report.read[x]) / len(report.read[x]) < stored[x] for x in managed)
