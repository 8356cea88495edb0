"""The program of docs/many-gpus.md runs as it stands under torchrun, in two processes on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpolicy import WriteGate
from kvpolicy.evaluation.models import tiny_llama
from tests.support.docs import ROOT, blocks
from tests.support.stage import tiny_gate, tiny_tokenizer


@pytest.mark.slow
def test_two_processes_run_the_page(tmp_path: Path) -> None:
    block, *_ = (x for x in blocks("python") if x.page == "docs/many-gpus.md")
    (tmp_path / "two.py").write_text(block.code, encoding="utf-8")
    # Folders of the names that the page loads, in place of the hub.
    folder = tmp_path / "meta-llama" / "Llama-3.1-8B-Instruct"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    gates = tmp_path / "WG-KV" / "checkpoints"
    gates.mkdir(parents=True)
    made = WriteGate.from_pretrained(tiny_gate(tmp_path / "gate.safetensors"))
    made.save(gates / "llama-3.1-8b-instruct-0.16.pt")
    (tmp_path / "book.txt").write_text("It was a dark and stormy night. " * 20, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", "-m", "tests.support.two_ranks", "two.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert last.endswith("bytes of keys and values on all ranks"), done.stdout
    assert int(last.split()[0].replace(",", "")) > 0
