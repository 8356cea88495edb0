"""One rank of test_parallel: generates on its share of the heads and saves what it saw."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from kvpolicy.adapters.hf import attach
from tests.support.adapters.models import SIZES, pipelines, prompt


def generate(model, name):
    """Tokens, and the positions that each of this rank's heads kept."""
    options = {**prompt([33, 21]), "max_new_tokens": 10, "do_sample": False}
    with attach(model, pipelines()[name], **SIZES) as attachment:
        cache = attachment.new_cache()
        tokens = model.generate(**options, past_key_values=cache)
    heads = range(cache.spec.kv_heads)
    return tokens, [
        [[cache.state.kept(layer, row, head).tolist() for row in (0, 1)] for layer in (0, 1)]
        for head in heads
    ]


def main(folder, rank):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    found = {name: generate(model, name) for name in ("striped", "gate", "gate-quest-snapkv")}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
