"""A tiny model in place of the paper's: its gates, and files as the benchmarks release theirs."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch

from ...admission import WriteGate

_ANY = list(string.ascii_lowercase)  # of which a random model's answer holds some


def tiny_gate(lam: float) -> WriteGate:
    """A random gate for `tiny_llama` that admits less for a larger lambda."""
    generator = torch.Generator().manual_seed(0)
    return WriteGate(
        norm_pre=torch.ones(2, 32),
        norm_post=torch.ones(2, 32),
        w1=torch.randn(2, 2, 16, 64, generator=generator) / 4,
        b1=torch.zeros(2, 2, 16),
        w2=torch.randn(2, 2, 16, generator=generator),
        b2=torch.full((2, 2), -2.0 - lam),
        window=16,
    )


def tiny_data(folder: Path) -> tuple[Path, ...]:
    """Files of HELMET and of AIME25 in their columns, a few rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = [{"title": f"page {n}", "text": f"{'abc'[n % 3]} is here. " * 6} for n in range(4)]
    files: dict[str, list[dict[str, Any]]] = {
        "nq": [{"ctxs": pages[n:], "question": f"who {n}?", "answers": _ANY} for n in range(3)],
        "recall": [
            {"context": f"the key {n} has a value. " * 12, "question": f"key {n}", "answer": _ANY}
            for n in range(3)
        ],
        "aime25": [
            {"context": "", "question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(3)
        ],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    helmet, aime = folder / "helmet", folder / "aime"
    for home, names in ((helmet, ("nq", "recall")), (aime, ("aime25",))):
        home.mkdir(exist_ok=True)
        for name in names:
            (folder / f"{name}.jsonl").replace(home / f"{name}.jsonl")
    return helmet, aime
