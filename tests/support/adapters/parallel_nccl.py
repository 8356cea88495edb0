"""Two GPUs that share a model under NCCL; `torchrun --nproc-per-node 2 -m` runs it.

Captured steps are eager ones bit for bit, logits lie within the error of the dtype of one GPU's,
kept sets are one GPU's where nothing is rounded away, and a failure anywhere ends both ranks.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from kvpolicy.adapters.hf import attach
from tests.support.adapters import parallel_captured as steps
from tests.support.adapters.models import SIZES, prompt, tiny
from tests.support.adapters.parallel import failures, pipeline, sampled, saved

SLACK = 1e-4  # of float32 logits: products of a layer are summed in another order


def equal_here_and_there(name, tokens):
    both = [torch.empty_like(tokens, device="cuda") for _ in range(2)]
    dist.all_gather(both, tokens.cuda())
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
    ids = prompt([120])["input_ids"].cuda()
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
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


def main():
    warnings.simplefilter("ignore")
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    told = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(told)
    folder = told[0]
    if rank == 0:
        tiny().save_pretrained(folder)
        with attach(tiny().cuda(), pipeline("adaptive"), **SIZES) as one:
            one.read(prompt([9])["input_ids"].cuda()).save(Path(folder) / "whole")
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    check_captured(model, rank)
    check_one_gpu(model, folder, rank)
    equal, *_ = saved(model, rank, folder)
    assert equal
    for name, tokens in sampled(model, rank).items():
        equal_here_and_there(name, tokens)
    check_failures(model, rank, folder)
    print(f"rank {rank}: all agreed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
