"""How much memory a long context takes, before anything is loaded.

    python examples/plan_memory.py                       # two shapes with published gates
    python examples/plan_memory.py --model ID --tokens 64000 --admitted 0.1

Sizes follow from the model's configuration alone: nothing but a config file is ever downloaded.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from kvpolicy.adapters.hf import fit_report

GIB = 2**30
SHAPES: dict[str, PreTrainedConfig] = {
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "Qwen3-4B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model of the hub, or its folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_000, 100_000, 400_000])
    parser.add_argument("--admitted", type=float, default=0.2, help="fraction that is admitted")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args(arguments)

    shapes = {args.model: AutoConfig.from_pretrained(args.model)} if args.model else SHAPES
    table = Table("model", title=f"GiB in bf16, {args.admitted:.0%} admitted, batch {args.batch}")
    columns = ("tokens", "weights", "full cache", "cache", "of it K/V", "kept", "total", "saved")
    for name in columns:
        table.add_column(name, justify="right")
    for name, config in shapes.items():
        for tokens in args.tokens:
            plan = fit_report(
                config, tokens, admitted=args.admitted, batch=args.batch, dtype=torch.bfloat16
            )
            table.add_row(
                name,
                f"{tokens:,}",
                f"{plan.weights / GIB:.2f}",
                f"{plan.full / GIB:.2f}",
                f"{plan.cache / GIB:.2f}",
                f"{(plan.pages + plan.ring) / GIB:.2f}",
                f"{plan.kept:.1%}",
                f"{plan.total / GIB:.2f}",
                f"{plan.saving:.0%}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
