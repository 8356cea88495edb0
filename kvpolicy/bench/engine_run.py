"""Runs vLLM once and tells what requests took: `python -m kvpolicy.bench.engine_run JOB`.

It is started in a process of its own, since vLLM holds a device for as long as its process lives.
Each line that begins with `TOLD` is a part that is finished.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from typing import Any

from .._extras import extra

TOLD = "vllm told: "
# One process, no network, no server.
QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


class Engine:
    """An engine in this process; `most` are the requests that ran at once since `generate`."""

    def __init__(self, arguments: dict[str, Any], words: int) -> None:
        with extra("vllm"):
            from vllm import LLM

        self.llm, self.words, self.most = LLM(**arguments), words, 0
        self.rng = random.Random(0)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        schedule = self.scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            found = schedule(*args, **kwargs)
            self.most = max(self.most, len(self.scheduler.running))
            return found

        self.scheduler.schedule = counted

    def generate(self, lengths: list[int], new: int) -> float:
        """Seconds of prompts of random tokens with `new` greedy tokens each.

        Raises:
            RuntimeError: a request ended early.
        """
        with extra("vllm"):
            from vllm import SamplingParams

        prompts: list[Any] = [
            {"prompt_token_ids": [self.rng.randrange(1, self.words) for _ in range(n)]}
            for n in lengths
        ]
        sampled = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        self.most, start = 0, time.perf_counter()
        done = self.llm.generate(prompts, sampled, use_tqdm=False)
        taken = time.perf_counter() - start
        if any(len(x.outputs[0].token_ids) != new for x in done) or len(done) != len(lengths):
            raise RuntimeError("a request did not finish")
        return taken

    def counted(self) -> dict[str, Any]:
        """Memory for the cache as vLLM planned it, and what kvpolicy's workers counted."""
        config = self.scheduler.kv_cache_config
        found: dict[str, Any] = {"blocks": config.num_blocks}
        if self.llm.llm_engine.vllm_config.additional_config:
            from kvpolicy.adapters.vllm import counters

            found["ranks"] = self.llm.collective_rpc(counters)
        return found


def tell(part: str, **found: Any) -> None:
    """Prints a finished part for the process that asked."""
    print(TOLD + json.dumps({"part": part, **found}), flush=True)


def run(job: dict[str, Any]) -> None:
    """Starts an engine and measures the parts of a job, each told when it is finished."""
    if "additional_config" in job["arguments"]:
        from kvpolicy.adapters.vllm import register

        register()
    start = time.perf_counter()
    engine = Engine(job["arguments"], job["words"])
    tell("start", s=time.perf_counter() - start, **engine.counted())
    for lengths in job["warm"]:
        engine.generate(lengths, 8)
    for length in job["single"]:
        one = [engine.generate([length], 1) for _ in range(job["runs"])]
        many = [engine.generate([length], job["new"] + 1) for _ in range(2)]
        step = 1e3 * (min(many) - min(one)) / job["new"]
        tell("single", tokens=length, ttft=statistics.median(one), tpot=step, runs=[one, many])
    for name, lengths, new in job["batches"]:
        taken = engine.generate(lengths, new)
        tell("batch", name=name, s=taken, most=engine.most, tokens=sum(lengths), new=new)
    tell("end", **engine.counted())


if __name__ == "__main__":
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    run(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # threads of the engine may wait for ever
