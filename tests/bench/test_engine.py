"""vLLM's rows, from a stand-in for its engine: what is told, what is cut off, what is beside."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from kvpolicy import BackendError, CachePipeline, RandomGate
from kvpolicy.bench import engine, runner
from kvpolicy.bench.context import Bench
from kvpolicy.pipeline_files import pipeline_from

STAND_IN = """
import os, time
from types import SimpleNamespace as S

class SamplingParams:
    def __init__(self, max_tokens, **_):
        self.n = max_tokens

class LLM:
    def __init__(self, **told):
        print("starting up")
        scheduler = S(running=[], kv_cache_config=S(num_blocks=7), schedule=lambda: None)
        core = S(engine_core=S(scheduler=scheduler))
        config = S(additional_config=told.get("additional_config"))
        self.llm_engine, self.scheduler = S(engine_core=core, vllm_config=config), scheduler

    def generate(self, prompts, sampled, use_tqdm):
        self.scheduler.running = list(prompts)
        self.scheduler.schedule()
        if len(prompts) > 1 and "BREAKS" in os.environ:
            raise RuntimeError("no room")
        if len(prompts) > 1 and "HANGS" in os.environ:
            time.sleep(600)
        time.sleep(0.001 * sampled.n)
        short = "SHORT" in os.environ
        return [S(outputs=[S(token_ids=[0] * (sampled.n - short))]) for _ in prompts]

    def collective_rpc(self, asked):
        return [{"refused": 3, "row_bytes": 2 * 10**9}]
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    # The plugin is not what is tested here.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, types\n"
        "plugin = types.ModuleType('kvpolicy.adapters.vllm')\n"
        "plugin.register, plugin.counters = lambda: None, None\n"
        "sys.modules['kvpolicy.adapters.vllm'] = plugin\n"
    )
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(root)]))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return Bench(quick=True, seconds=60)


def test_plain_comes_first_and_a_pipeline_beside_it(bench: Bench) -> None:
    plain, gate = engine.cases(bench)
    first, second = list(plain.run(bench)), list(gate.run(bench))
    names = [row.name.removeprefix("vLLM, its own cache, ") for row in first]
    assert names == ["start", "0K: TTFT", "0K: TPOT", "48 of 32K: total", "48 of 32K: at once"]
    assert first[0].note == "7 blocks" and first[-1].value == 3
    assert all(not row.baseline for row in first)
    assert [row.name.removeprefix("vLLM, 25 % admitted, ") for row in second] == [
        *names, "left out",
    ]  # fmt: skip
    assert second[-2].baseline == "1 of plain 3 requests"
    assert [x.verdict for x in second[-2].goals] == ["missed"]
    assert second[-1].value == 3 and "2.00 GB of rows" in second[-1].note
    one, many = first[2].extra["runs"]
    assert len(one) == 1 and len(many) == 2  # of one token, and of four more
    assert first[2].value == pytest.approx(250 * (min(many) - min(one)))


@pytest.mark.parametrize(
    "how, said", [("BREAKS", "exit code 1: RuntimeError: no room"), ("SHORT", "did not finish")]
)
def test_what_was_finished_before_a_failure_counts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    monkeypatch.setenv(how, "1")
    rows = runner.attempt(bench, engine.cases(bench)[0])
    assert said in rows[-1].error
    done = [row.name.split(", ")[-1] for row in rows[:-1]]
    assert done == (["start", "0K: TTFT", "0K: TPOT"] if how == "BREAKS" else ["start"])


def test_an_engine_that_hangs_is_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HANGS", "1")
    job = engine.job_of(bench, engine.Engine(cache=engine.PLAIN), tmp_path)
    found, why = engine.told(job, 8.0)
    assert "exit code -9" in why and "end" not in [x["part"] for x in found]


def test_what_an_engine_is_asked(bench: Bench, tmp_path: Path) -> None:
    job = engine.job_of(bench, engine.Engine(cache=engine.GATE, ranks=2), tmp_path)
    own = job["arguments"]["additional_config"]["kvpolicy"]
    assert pipeline_from(own["pipeline"]) == CachePipeline(
        admission=RandomGate(sparsity=0.75), window=8
    )
    assert job["arguments"]["tensor_parallel_size"] == 2
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 64
    plain = engine.job_of(bench, engine.Engine(cache=engine.PLAIN), tmp_path)
    assert "additional_config" not in plain["arguments"]
    assert {k: v for k, v in plain.items() if k != "arguments"} == {
        k: v for k, v in job.items() if k != "arguments"
    }


def test_long_answers_are_asked_for_alone(bench: Bench, tmp_path: Path) -> None:
    bench.quick = False
    job = engine.job_of(bench, engine.Engine(cache=engine.PLAIN, long=True), tmp_path)
    assert not job["single"]
    assert [(name, sum(lengths), new) for name, lengths, new in job["batches"]] == [
        ("32 of 4K-60K + 512", 1_132_534, 512), ("32 of 4K-60K + 1024", 1_132_534, 1024),
    ]  # fmt: skip


def test_goals_beside_plain(bench: Bench) -> None:
    row = engine.Row(group="vllm", name="x", value=3.0, unit="s")
    half = engine._beside(row, engine.attrs.evolve(row, value=6.0), "100K: TTFT")
    assert half.baseline == "0.5 of plain 6 s" and [x.verdict for x in half.goals] == ["met"]
    assert not engine._beside(row, row, "32K: TTFT").goals


def test_without_vllm_there_is_nothing_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    bench = Bench(quick=True, seconds=60)
    assert not engine.cases(bench)
    with pytest.raises(BackendError, match="vllm: .*vLLM is not installed"):
        runner.choose(bench, ["vllm"])
