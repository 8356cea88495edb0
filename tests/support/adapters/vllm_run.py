"""Runs jobs on a real vLLM: `PYTHON -m tests.support.adapters.vllm_run JOBS OUT`.

A job has requests (prompt and number of new tokens) or a session's inputs, the engine's arguments,
which requests are aborted after how many steps, and before which steps everything cached is reset.
What comes out for each: the tokens of the requests, what workers counted, and how often vLLM
preempted; or the error at start.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
}  # fmt: skip


def run(job):
    from vllm import LLM, SamplingParams
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    from kvpolicy.adapters.vllm import counters

    llm = LLM(
        job["model"], skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        disable_log_stats=False, attention_config={"backend": "CUSTOM"},
        **{"enable_prefix_caching": False, **job["llm"]},
    )  # fmt: skip
    engine, tokens, reasons = llm.llm_engine, {}, {}
    talked = session(engine, job["inputs"], job["resets"]) if job.get("inputs") else []
    for place, (prompt, new) in enumerate(job["requests"]):
        params = SamplingParams(
            max_tokens=new, temperature=0, ignore_eos=True, detokenize=False, logprobs=None
        )
        engine.add_request(str(place), {"prompt_token_ids": prompt}, params)
    aborts = {int(place): step for place, step in job.get("aborts", {}).items()}
    steps, most, scheduler = 0, 0, engine.engine_core.engine_core.scheduler
    while engine.has_unfinished_requests():
        for place in [place for place, step in aborts.items() if step == steps]:
            engine.abort_request([str(place)])
        if steps in job.get("resets", []):  # as pausing or sleeping resets what is cached
            assert engine.reset_prefix_cache(reset_running_requests=True)
        for done in engine.step():
            if done.finished:
                place = int(done.request_id.split("-")[0])
                tokens[place] = list(done.outputs[0].token_ids)
                reasons[place] = done.outputs[0].finish_reason
        steps += 1
        most = max(most, len(scheduler.running))
    metrics = {x.name: x.value for x in llm.get_metrics() if hasattr(x, "value")}
    pool = scheduler.kv_cache_manager.block_pool
    free, usage = pool.get_num_free_blocks(), pool.get_usage()
    reset = engine.reset_prefix_cache(reset_running_requests=True)
    ranks = llm.collective_rpc(counters) if job["llm"]["additional_config"] else [{}]
    del llm, engine, scheduler, pool
    ensure_kv_transfer_shutdown()  # a process has one connector
    gc.collect()
    return {
        "tokens": tokens, "reasons": reasons, "preempted": metrics["vllm:num_preemptions"],
        "metric": metrics.get("vllm:kvpolicy_refused_tokens"), "free": free, "most": most,
        "ranks": ranks, "usage": usage, "session": talked, "reset": reset, **ranks[0],
    }  # fmt: skip


def session(engine, inputs, resets):
    """New tokens of a request whose input comes in parts, with 12 after each."""
    from vllm import SamplingParams

    params, name = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True), "session"
    found, steps = [], 0
    for prompt in inputs:
        request = engine.input_processor.process_inputs(
            name, {"prompt_token_ids": prompt}, params, engine.get_supported_tasks(), resumable=True
        )
        if not found:
            engine.input_processor.assign_request_id(request)
            name = request.request_id
        request.external_req_id = "session"
        engine.engine_core.add_request(request)
        new = []
        while len(new) < 12:
            if steps in resets:
                assert engine.reset_prefix_cache(reset_running_requests=True)
            for output in engine.engine_core.get_output().outputs:
                new += output.new_token_ids
            steps += 1
        found.append(new)
    engine.engine_core.abort_requests([name])
    engine.engine_core.get_output()
    return found


def main(jobs, out):
    os.environ.update(QUIET)
    from kvpolicy.adapters.vllm import register

    register()
    found = []
    for job in json.loads(Path(jobs).read_text()):
        try:
            found.append(run(job))
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            found.append({"error": str(error)})
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
