"""vLLM with its own cache and with a pipeline: the same requests, one engine after the other."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch

from ..errors import BackendError
from .context import Bench, Case
from .engine_run import TOLD
from .many import mixture
from .model import FRACTION, SHAPES, SIZES
from .rows import Goal, Row

PLAIN, GATE, FP8 = "its own cache", "25 % admitted", "fp8 cache"
MARGIN = 1.1  # times the fraction that is admitted, for which blocks are planned
SEQUENCES = 64  # of both sides, and the graphs
GRAPHS = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
NEW, LONG, LONGEST = 128, (512, 1024), 110_000
SINGLE = (32_000, 100_000)
AT_ONCE, MIXTURE = "48 of 32K", "32 of 4K-60K"
# Parts of plain vLLM's that a gate may take, by row; requests at once are at least so many times.
WANTED = {
    "100K: TTFT": 0.55, "100K: TPOT": 0.75, f"{MIXTURE}: total": 0.7,
    f"long answers, {MIXTURE} + 512: total": 1 / 1.8,
    f"long answers, {MIXTURE} + 1024: total": 1 / 2.2,
}  # fmt: skip
MORE = 3.2
START = 150.0  # seconds until an engine and its graphs are there


@attrs.frozen(kw_only=True)
class Engine:
    """One way to run vLLM, over `ranks` devices; `long` asks for long answers alone."""

    cache: str
    ranks: int = 1
    long: bool = False

    def __str__(self) -> str:
        name = f"vLLM, {self.cache}" + (f", TP {self.ranks}" if self.ranks > 1 else "")
        return name + (", long answers" if self.long else "")


def job_of(bench: Bench, engine: Engine, folder: Path) -> dict[str, Any]:
    """What the process of an engine is asked, its model's config in `folder`."""
    tiny: dict[str, Any] = dict(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    sizes = SIZES[SHAPES[0]] | bench.pick({}, tiny)
    config = sizes | dict(
        architectures=["LlamaForCausalLM"], model_type="llama", rope_theta=500000.0,
        max_position_embeddings=1 << 19, rms_norm_eps=1e-5, torch_dtype="bfloat16",
        tie_word_embeddings=False, hidden_act="silu", bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    arguments: dict[str, Any] = dict(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, seed=0,
        max_model_len=bench.pick(LONGEST, 128), max_num_seqs=bench.pick(SEQUENCES, 4),
        enable_prefix_caching=False, generation_config="vllm", tensor_parallel_size=engine.ranks,
    )  # fmt: skip
    if bench.device.type == "cuda":
        arguments |= dict(
            dtype="bfloat16", gpu_memory_utilization=0.9,
            compilation_config={"cudagraph_capture_sizes": GRAPHS},
            attention_config={"backend": "CUSTOM" if engine.cache == GATE else "FLASH_ATTN"},
        )  # fmt: skip
    else:
        arguments |= dict(dtype="float32", enforce_eager=True, num_gpu_blocks_override=200)
        if engine.cache == GATE:
            arguments["attention_config"] = {"backend": "CUSTOM"}
    if engine.cache == FP8:
        arguments["kv_cache_dtype"] = "fp8"
    if engine.cache == GATE:
        arguments["additional_config"] = {
            "kvpolicy": {
                "pipeline": pipeline(bench),
                "admitted": MARGIN * FRACTION,
                "row_memory": bench.pick(0.1, 10.0),
            }
        }
    return {
        "arguments": arguments,
        "words": sizes["vocab_size"],
        "new": bench.pick(NEW, 4),
        "runs": bench.pick(3, 1),
        "warm": bench.pick([[2000], [32_000], [600] * 16], [[9]]),
        "single": [] if engine.long else bench.pick(list(SINGLE), [40]),
        "batches": _batches(bench, engine.long),
    }


def _batches(bench: Bench, long: bool) -> list[tuple[str, list[int], int]]:
    """Prompts that are all there at once: name, lengths, and new tokens of each."""
    mixed = bench.pick(list(mixture(32, 4000, 60_000)), [9, 31])
    if long:
        return [(f"{MIXTURE} + {new}", mixed, bench.pick(new, 6)) for new in LONG]
    many = bench.pick([32_000] * 48, [30, 12, 5])
    new = bench.pick(NEW, 4)
    return [(AT_ONCE, many, new), *bench.pick([(MIXTURE, mixed, new)], [])]


def pipeline(bench: Bench) -> dict[str, Any]:
    """The plain values of a pipeline that admits a quarter at random; no gate is computed."""
    from ..admission import RandomGate
    from ..pipeline import CachePipeline
    from ..pipeline_files.write import data_of

    admission = RandomGate(sparsity=1 - FRACTION)
    return data_of(CachePipeline(admission=admission, window=bench.pick(256, 8)))


def told(job: dict[str, Any], patience: float) -> tuple[list[dict[str, Any]], str]:
    """The parts that a process of vLLM finished, and why there are no more of them."""
    asked = [sys.executable, "-m", f"{__package__}.engine_run", json.dumps(job)]
    with subprocess.Popen(
        asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        late = threading.Timer(patience, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        found, last = list[dict[str, Any]](), ""
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(TOLD):
                    found.append(json.loads(line.removeprefix(TOLD)))
                elif line.strip():
                    last = line.strip()
            code = process.wait()
        finally:
            late.cancel()
    if found and found[-1]["part"] == "end":
        return found, ""
    return found, f"vLLM ended with exit code {code}: {last[-160:]}"


def rows(bench: Bench, engine: Engine) -> Iterator[Row]:
    """Time to the first token, per token, requests at once and totals, beside plain vLLM's."""
    with tempfile.TemporaryDirectory() as folder:
        found, why = told(job_of(bench, engine, Path(folder)), max(bench.left() - 5, 10))
    for part in found:
        for row in _of(engine, part):
            name = row.name.removeprefix(f"vLLM, {engine.cache}, ")
            key = "vllm", name
            if engine.cache == PLAIN:
                bench.shared[key] = row
            elif (plain := bench.shared.get(key)) is not None:
                row = _beside(row, plain, name if engine.cache == GATE else "")
            yield row
    if why:
        raise BackendError(why)


def _of(engine: Engine, part: dict[str, Any]) -> Iterator[Row]:
    kind = part["part"]
    make = functools.partial(Row, group="vllm", extra=part)
    if kind == "start":
        yield make(name=f"{engine}, start", value=part["s"], unit="s", note=_counted(part))
    elif kind == "single":
        name = f"{engine}, {part['tokens'] // 1000}K"
        yield make(name=f"{name}: TTFT", value=part["ttft"], unit="s")
        yield make(name=f"{name}: TPOT", value=part["tpot"])
    elif kind == "batch":
        name = f"{engine}, {part['name']}"
        yield make(
            name=f"{name}: total", value=part["s"], unit="s", rate=part["tokens"] / part["s"],
            rate_unit="prompt tok/s", note=f"{part['new']} new tokens each",
        )  # fmt: skip
        yield make(name=f"{name}: at once", value=float(part["most"]), unit="requests")
    elif part.get("ranks"):
        refused = sum(x["refused"] for x in part["ranks"])
        yield make(name=f"{engine}, left out", value=refused, unit="tokens of heads",
                   note=_counted(part))  # fmt: skip


def _counted(part: dict[str, Any]) -> str:
    ranks = part.get("ranks") or []
    return f"{part['blocks']} blocks" + "".join(
        f", {x['row_bytes'] / 1e9:.2f} GB of rows" for x in ranks
    )


def _beside(row: Row, plain: Row, name: str) -> Row:
    assert row.value is not None and plain.value
    part, goals = row.value / plain.value, list[Goal]()
    if name in WANTED:
        goals.append(Goal(what="of plain", wanted=WANTED[name], got=part))
    elif name == f"{AT_ONCE}: at once":
        goals.append(Goal(what="times plain", wanted=MORE, got=part, at_most=False))
    said = f"{part:.3g} of plain {plain.value:.4g} {plain.unit}"
    return attrs.evolve(row, goals=tuple(goals), baseline=said)


def cases(bench: Bench) -> list[Case]:
    """Where vLLM is installed; over two devices too where they are there."""
    if importlib.util.find_spec("vllm") is None:
        return []
    plan = [Engine(cache=PLAIN), Engine(cache=GATE), Engine(cache=FP8)]
    plan += [Engine(cache=PLAIN, long=True), Engine(cache=GATE, long=True)]
    if torch.cuda.device_count() > 1:
        plan += [Engine(cache=PLAIN, ranks=2), Engine(cache=GATE, ranks=2)]
    return [
        Case(
            group="vllm", name=str(x), run=functools.partial(_case, x), rank=96 + place,
            seconds=START + 90,
        )
        for place, x in enumerate(bench.pick(plan, plan[:2]))
    ]  # fmt: skip


def _case(engine: Engine, bench: Bench) -> Iterator[Row]:
    return rows(bench, engine)
