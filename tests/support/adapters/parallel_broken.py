"""One rank of test_parallel: breaks off where no vote can reach the other, again and again."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from kvpolicy.adapters.hf import attach, models
from tests.support.adapters.models import SIZES, pipelines, prompt
from tests.support.adapters.parallel import told
from tests.support.adapters.rehearsed import rehearsed
from tests.support.two_ranks import end_at_once

# Where rank 1 fails, at the n-th time that a module runs, and how the ranks decode.
PLACES = {
    "layer of a prompt": ("model.layers.1.mlp", 1, False),
    "layer of a step": ("model.layers.0.self_attn.o_proj", 4, False),
    "keys of a prompt": ("model.layers.0.self_attn.k_proj", 2, False),
    "norm of a step": ("model.layers.1.input_layernorm", 5, False),
    "values of a captured step": ("model.layers.0.self_attn.v_proj", 10, True),
    "captured step": ("model.layers.1.mlp", 9, True),
    "head": ("lm_head", 3, False),
    "embedding": ("model.embed_tokens", 2, False),
}
PATIENCE = 100  # seconds until a rank gives up on the other, which fails the test


def load(folder, rank, name, seconds=600):
    """The rank's part of the model, in a new group."""
    models._KNOWN.clear()  # as in new processes
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet {name}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=seconds),
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()


def wait_for_both(folder, rank, name):
    """Shows that no rank needs the other's process to end."""
    for part in (rank, 1 - rank):
        path, began = Path(folder) / f"{name} {part}", time.monotonic()
        if part == rank:
            path.touch()
        while not path.exists():
            assert time.monotonic() - began < PATIENCE, f"{name}: the other rank waits"
            time.sleep(0.02)


def break_off(model, rank, place):
    """What is raised here, what then is, and whether the cache is as it was."""
    module, nth, captured = place
    seen = []

    def fail(*args):
        seen.append(1)
        if rank == 1 and len(seen) == nth:
            raise MemoryError("broke")

    with attach(model, pipelines()["gate"], **SIZES) as attached, contextlib.ExitStack() as stack:
        cache, tail = attached.read(prompt([33])["input_ids"]), prompt([9], seed=2)["input_ids"]
        before = cache.columns, cache.state.lengths, cache.report().kv
        model.get_submodule(module).register_forward_pre_hook(fail)
        if captured:
            stack.enter_context(rehearsed())
        raised = told(lambda: attached.ask(cache, tail, max_new_tokens=30))
        gc.collect()  # the fork that was asked, which the error's frames hold
        after = cache.columns, cache.state.lengths, cache.report().kv
        again = told(lambda: attached.ask(cache, tail, max_new_tokens=3))
    return *raised, again, before == after


def own_loop(model, rank):
    """A loop of one's own, without generate."""

    def fail(*args):
        if rank == 1:
            raise MemoryError("broke")

    with attach(model, pipelines()["gate"], **SIZES) as attached, torch.no_grad():
        cache = attached.read(prompt([33])["input_ids"])
        model.lm_head.register_forward_pre_hook(fail)
        return told(lambda: model(prompt([1])["input_ids"], past_key_values=cache))


def main(folder, rank):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for name, place in PLACES.items():
        model = load(folder, rank, name)
        found[name] = break_off(model, rank, place)
        wait_for_both(folder, rank, name)
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    model = load(folder, rank, "loop")
    found["own loop"] = own_loop(model, rank)
    wait_for_both(folder, rank, "loop")
    with contextlib.suppress(Exception):
        dist.destroy_process_group()
    model = load(folder, rank, "stopped", seconds=12)
    with attach(model, pipelines()["gate"], **SIZES) as attached:
        cache = attached.read(prompt([33])["input_ids"])
        if rank == 1:
            torch.save(found, Path(folder) / "broken 1.pt")
            os.kill(os.getpid(), signal.SIGSTOP)
        found["stopped"] = told(lambda: attached.read(prompt([9])["input_ids"], cache=cache))
    torch.save(found, Path(folder) / "broken 0.pt")
    end_at_once()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
