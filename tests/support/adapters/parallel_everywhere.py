"""One rank of test_parallel: fails in every op, layer, phase and exchange that a call goes through.

Nothing is timed: the group waits ten minutes for a rank, and the test gives up long before.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from kvpolicy import Adaptive, CachePipeline, Quest, RandomGate, SnapKV, Tokens, TotalCap
from kvpolicy.adapters.hf import attach, load_cache, ranks
from kvpolicy.adapters.hf import cache as caches
from kvpolicy.backend import _MODULES, implementation
from tests.support.adapters.faults import Fault, digest
from tests.support.adapters.models import SIZES, prompt
from tests.support.adapters.parallel import told
from tests.support.two_ranks import met

# Beside the ops: what policies decide, what ranks exchange and make for it, what files and forks.
PLACES = {
    "admit": (RandomGate, "admit"),
    "select": (Quest, "select"),
    "score": (SnapKV, "score"),
    "budget": (Adaptive, "keep"),
    "begin": (CachePipeline, "begin"),
    "commit": (CachePipeline, "commit"),
    "end of a prompt": (CachePipeline, "end_prompt"),
    "report": (CachePipeline, "report"),
    "rows": (caches, "select_rows"),
    "file": (caches, "save"),
    "key of a call": (ranks.Ranks, "key"),
    "room of an exchange": (ranks.Ranks, "_room"),
}


@contextlib.contextmanager
def counted(fails=None, nth=0):
    """Counts calls of ops and places by name; the `nth` of `fails` raises."""
    seen = Counter()

    def watched(name, call):
        def run(*args, **kwargs):
            seen[name] += 1
            if name == fails and seen[name] == nth:
                raise Fault(name)
            return call(*args, **kwargs)

        return run

    ops = implementation("reference")
    places = PLACES | {name: (ops, name) for name in _MODULES}
    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in places.items():
            call = watched(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, call))
        yield seen


CALLS = {
    "late": ("read", "ask", "beams", "report", "fork", "save", "load"),
    "capped": ("read",),  # which evicts when the prompt ends
}


def pipelines():
    late = SnapKV(budget=Adaptive(Tokens(14)), observation=4, when="decode")
    return {
        "late": CachePipeline(
            admission=RandomGate(sparsity=0.3), selection=Quest(budget=9), eviction=late, window=5
        ),
        "capped": CachePipeline(
            eviction=SnapKV(budget=TotalCap(tokens=40), observation=4), window=5
        ),
    }


def calls(attached, cache, folder):
    """What a program does with a cache, by name."""
    tail = prompt([9, 9], seed=2)["input_ids"]
    file = f"{folder}/everywhere"
    return {
        "read": lambda: attached.read(tail, cache=cache),
        "ask": lambda: attached.ask(cache, tail, max_new_tokens=12),
        "beams": lambda: attached.ask(cache, tail, max_new_tokens=3, num_beams=2),
        "report": lambda: cache.report(all_ranks=True),
        "fork": lambda: cache.fork(),
        "save": lambda: cache.save(file),
        "load": lambda: load_cache(attached.model, attached.pipeline, file, **SIZES),
    }


def walk(model, rank, folder, name):
    """By call, place, number and rank that fails: what was raised and left, and what comes next."""
    found, tail = {}, prompt([9, 9], seed=2)["input_ids"]
    with attach(model, pipelines()[name], **SIZES) as attached:

        def answer(cache):
            return attached.ask(cache, tail, max_new_tokens=3)

        def ended(cache):
            cache.end_prompt()
            return answer(cache)

        cache = attached.read(**prompt([33, 21]))
        wanted, before = answer(cache), digest(cache)
        found[name] = wanted, answer(attached.read(tail, cache=cache.fork()))
        for call in CALLS[name]:
            mine = cache.fork()
            with counted() as seen:
                calls(attached, mine, folder)[call]()
            both = [None, None]
            dist.all_gather_object(both, dict(seen))
            often = {place: min(n, both[1].get(place, 0)) for place, n in both[0].items()}
            for number, (place, most) in enumerate(sorted(often.items())):
                nth, who = (1, most)[number % 2], number // 2 % 2
                mine = cache.fork()
                with counted(place if rank == who else None, nth):
                    raised = told(calls(attached, mine, folder)[call])
                goes_on = torch.equal(answer(cache), wanted) and digest(cache) == before
                left = digest(mine)[1:] == before[1:], mine.columns
                got = []
                again = told(lambda got=got, mine=mine: got.append(ended(mine)))
                found[name, call, place, nth, who] = raised, goes_on, left, again, got
    return found


def main(folder, rank):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with met(f"{folder}/meet", rank):
        make, found = AutoModelForCausalLM.from_pretrained, {}
        model = make(folder, tp_plan="auto", dtype=torch.float32).eval()
        for name in pipelines():
            found |= walk(model, rank, folder, name)
        torch.save(found, Path(folder) / f"everywhere {rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
