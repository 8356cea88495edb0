"""Published write gates and DuoAttention patterns on the models that they were trained for.

    python examples/published_checkpoints.py llama --text book.txt
    python examples/published_checkpoints.py qwen --text book.txt --tokens 100000
    python examples/published_checkpoints.py llama --text book.txt --duo PATTERN
    python examples/published_checkpoints.py llama --dry-run    # tiny model, random files, CPU

Needs a GPU and access to the hub. Gates are files of the repository WG-KV/checkpoints; patterns
are folders of mit-han-lab/duo-attention, cloned by you. `--dry-run` writes random files in exactly
these layouts for a tiny model and runs the same code.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from kvpolicy import Admission, CachePipeline, DuoAttention, Quest, SnapKV, WriteGate
from kvpolicy.adapters.hf import attach, new_cache, spec_of

GATES = "WG-KV/checkpoints"


@attrs.frozen
class Published:
    """A model with published gates; `expand` is hidden units of the gate per channel."""

    model: str
    gate: str
    expand: float
    architecture: str


MODELS = {
    "llama": Published(
        "meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct-0.16.pt", 4.0, "llama"
    ),
    "qwen": Published(
        "Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b-instruct-2507-0.16.pt", 1.5, "qwen3"
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--text", type=Path, help="a long text file")
    parser.add_argument("--tokens", type=int, default=32_000, help="most tokens of the text")
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--question", default="Summarise this text in three sentences.")
    parser.add_argument("--duo", type=Path, help="a pattern folder, instead of the gate")
    parser.add_argument("--sparsity", type=float, default=0.5, help="streaming heads, with --duo")
    parser.add_argument("--quest", type=int, help="tokens a head reads while decoding")
    parser.add_argument("--snapkv", type=int, help="tokens a head holds while decoding")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)

    published = MODELS[args.model]
    with tempfile.TemporaryDirectory() as scratch:
        if args.dry_run:
            model, ids, gates, duo = rehearse(published, Path(scratch))
            tokenizer, duo = None, duo if args.duo else None
        else:
            model, tokenizer, ids = load(published.model, args)
            gates, duo = GATES, args.duo
        admission: Admission
        if duo is None:
            admission = WriteGate.from_pretrained(gates, published.gate)
        else:
            admission = DuoAttention.from_pretrained(duo, sparsity=args.sparsity)
        policies: dict[str, Any] = {"admission": admission}
        if args.quest:
            policies["selection"] = Quest(budget=args.quest)
        if args.snapkv:
            policies["eviction"] = SnapKV(budget=args.snapkv, when="decode")
        generate(model, tokenizer, ids, CachePipeline(**policies), args.new_tokens)


def generate(
    model: nn.Module, tokenizer: Any, ids: Tensor, pipeline: CachePipeline, new_tokens: int
) -> None:
    """Answers, and prints what took effect."""
    cache = new_cache(model, pipeline)
    with attach(model, pipeline):
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
        )
    answer = out[0, ids.shape[1] :]
    report = cache.report()
    dense = ids.shape[1] * 2 * cache.spec.head_dim * cache.spec.dtype.itemsize
    dense *= cache.spec.layers * cache.spec.kv_heads
    print(answer.tolist() if tokenizer is None else tokenizer.decode(answer))
    print(f"admission        {type(pipeline.admission).__name__}, window {pipeline.window}")
    print(f"prompt tokens    {ids.shape[1]}")
    print(f"admitted         {report.mean_admitted:.1%}")
    for layer, heads in enumerate(report.admitted):
        if heads is not None:
            print(f"  layer {layer:2}       {' '.join(f'{x:4.0%}' for x in heads)}")
    print(f"read per token   {report.mean_read:.0f}")
    print(f"bytes of K and V {report.kv:,} ({report.kv / dense:.1%} of a full cache)")


def load(name: str, args: argparse.Namespace) -> tuple[nn.Module, Any, Tensor]:
    """The model, its tokenizer, and a conversation about the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.text is None:
        raise SystemExit("--text: wanted a text file (or --dry-run)")
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    text = tokenizer.decode(text[: args.tokens])
    chat = [{"role": "user", "content": f"{text}\n\n{args.question}"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map="cuda")
    return model.eval(), tokenizer, ids.to(model.device)


def rehearse(published: Published, folder: Path) -> tuple[nn.Module, Tensor, Path, Path]:
    """A tiny model of the same family, and random files in the published layouts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        published.architecture,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    spec = spec_of(model)
    dim, heads = spec.head_dim, spec.kv_heads
    width = int(dim * published.expand)
    state = {}
    for n in range(spec.layers):
        prefix = f"model.layers.{n}.self_attn.g_predictors."
        for name, tensor in {
            "pre_key_norm.weight": torch.ones(dim),
            "post_key_norm.weight": torch.ones(dim),
            "conv1.weight": torch.randn(heads * width, 2 * dim, 1) / dim**0.5,
            "conv1.bias": torch.zeros(heads * width),
            "conv2.weight": torch.randn(heads, width, 1) * 4 / width**0.5,
            "conv2.bias": torch.full((heads,), -2.2),  # sigmoid(-2.2) is about the threshold
        }.items():
            state[prefix + name] = nn.Parameter(tensor)
    torch.save(state, folder / published.gate)

    duo = folder / "lr=0.02-reg=0.05-ctx=1000_128000-multi_passkey10"
    duo.mkdir()
    rows = torch.rand(spec.layers, heads, dtype=torch.float64).tolist()
    lines = ("\t".join(f"{value:.18e}" for value in row) for row in rows)
    (duo / "full_attention_heads.tsv").write_text("\n".join(lines) + "\n")
    (duo / "config.json").write_text(json.dumps({"sink_size": 128, "recent_size": 256}))
    return model, torch.randint(2, 500, (1, 700)), folder, duo


if __name__ == "__main__":
    main()
