"""What an installed kvpolicy does for whoever has just installed it, on small random models.

python first_attach.py TREE, from outside TREE, whose files must not be what is imported.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvpolicy import (
    CachePipeline,
    DuoAttention,
    Quest,
    Ratio,
    SnapKV,
    WriteGate,
    attach,
    pretrained,
)

GATE, DUO = "smollm2-135m-instruct-w64-keep25", "duo-smollm2-135m-instruct"


def smollm2_shape() -> LlamaForCausalLM:
    """A random model of SmolLM2-135M's layers and heads, for which the gate and the pattern are."""
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=108,
        head_dim=64,
        intermediate_size=64,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def main(tree: Path) -> None:
    package = Path(kvpolicy.__file__).resolve()
    assert not package.is_relative_to(tree), f"{package} is of the tree, not of the wheel"
    assert importlib.metadata.version("kvpolicy") == kvpolicy.__version__
    assert pretrained.names() == [DUO, GATE]
    model = smollm2_shape()
    ids = torch.randint(200, (1, 300))
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    pipelines = {
        "everything": CachePipeline(),
        "SnapKV": CachePipeline(eviction=SnapKV(budget=Ratio(0.5))),
        "gate": CachePipeline(admission=WriteGate.from_pretrained(GATE)),
        "gate + Quest": CachePipeline(
            admission=WriteGate.from_pretrained(GATE), selection=Quest(budget=128)
        ),
        "DuoAttention": CachePipeline(admission=DuoAttention.from_pretrained(DUO, sparsity=0.5)),
    }
    for name, pipeline in pipelines.items():
        with attach(model, pipeline) as attached:
            output = model.generate(ids, max_new_tokens=5, do_sample=False)
            report = attached.last_report()
        assert output.shape == plain.shape
        assert name != "everything" or torch.equal(output, plain)
        assert name == "everything" or report.mean_admitted < 1 or report.evicted
        print(f"{name}: {report.kv:,} bytes of keys and values")
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "kvpolicy")}
    print(f"Python {sys.version.split()[0]}, " + ", ".join(map(" ".join, versions.items())))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
