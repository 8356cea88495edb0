"""Two GPUs that share a model under NCCL; `torchrun --nproc-per-node 2 -m` runs it.

Captured steps are eager ones bit for bit, logits lie within the error of the dtype of one GPU's,
and a failure anywhere ends both ranks. Without GPUs the same runs under gloo, captured steps
rehearsed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from kvpolicy.adapters.hf import attach
from tests.support.adapters import parallel_captured as steps
from tests.support.adapters.models import SIZES, prompt, tiny
from tests.support.adapters.parallel import failures, pipeline, sampled, saved
from tests.support.adapters.rehearsed import rehearsed

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SLACK = 1e-4  # of float32 logits: products of a layer are summed in another order


def equal_here_and_there(name, tokens):
    both = [torch.empty_like(tokens, device=DEVICE) for _ in range(2)]
    dist.all_gather(both, tokens.to(DEVICE))
    assert torch.equal(*both), name


def check_captured(model, rank):
    found = steps.agreed(model, rank)
    equal_here_and_there("sampled, captured", found.pop("sampled"))
    for name, (same, eager, captured, captures, tokens) in found.items():
        assert same and eager == "eager: asked", name
        assert captured == "captured" and captures, (name, captured)
        equal_here_and_there(name, tokens)
    assert steps.recaptured(model, rank) == ("captured", 2)


def check_one_gpu(model, folder, rank):
    """Teacher-forced logits of both ways."""
    ids = prompt([120])["input_ids"].to(DEVICE)
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE).eval()
    found = []
    for each in (alone, model):
        with attach(each, pipeline("gate"), **SIZES) as attached, torch.no_grad():
            cache = attached.read(ids[:, :80])
            rows = [each(ids[:, n : n + 1], past_key_values=cache).logits for n in range(80, 120)]
            found.append(torch.cat(rows, 1))
    worst = float((found[0] - found[1]).abs().max())
    print(f"rank {rank}: logits differ by {worst:.2e} from one GPU's", flush=True)
    assert worst < SLACK * float(found[0].abs().max())


def check_failures(model, rank, folder):
    other = 1 - rank
    for name, (kind, said, _) in steps.failures(model, rank).items():
        if name == "cap":
            assert kind == "CapacityError", (name, said)
        elif int(name[-1]) == rank:
            assert (kind, said) == ("ValueError", "breaks"), name
        else:
            assert kind == "KVPolicyError" and f"rank {other}" in said, (name, said)
    for name, (kind, said, kept) in failures(model, rank, folder).items():
        assert kind != "none" and kept, (name, kind, said)


def check_files(model, rank, folder):
    equal, *_ = saved(model, rank, folder)
    assert equal


def check_sampling(model, rank):
    for name, tokens in sampled(model, rank).items():
        equal_here_and_there(name, tokens)


def attempt(name, check, rank):
    """Whether the check holds on both ranks; what does not is printed, and the next one runs."""
    began, said = time.monotonic(), ""
    try:
        check()
    except Exception:
        said = traceback.format_exc()
    both = [None, None]
    dist.all_gather_object(both, said)
    print(f"rank {rank}: {name}: {time.monotonic() - began:.1f} s {said or 'agreed'}", flush=True)
    return not any(both)


def main():
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("nccl" if CUDA else "gloo", timeout=patience)
    told = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(told)
    folder = told[0]
    if rank == 0:
        tiny().save_pretrained(folder)
        with attach(tiny().to(DEVICE), pipeline("adaptive"), **SIZES) as one:
            one.read(prompt([9])["input_ids"].to(DEVICE)).save(Path(folder) / "whole")
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    checks = {
        "captured is eager": lambda: check_captured(model, rank),
        "one GPU": lambda: check_one_gpu(model, folder, rank),
        "files": lambda: check_files(model, rank, folder),
        "sampling": lambda: check_sampling(model, rank),
        "failures": lambda: check_failures(model, rank, folder),
    }
    with contextlib.nullcontext() if CUDA else rehearsed():
        held = [attempt(name, check, rank) for name, check in checks.items()]
    dist.destroy_process_group()
    assert all(held)
    print(f"rank {rank}: all agreed", flush=True)


if __name__ == "__main__":
    main()
