"""What `--additional-config` may say, and what is refused when vLLM starts."""

from __future__ import annotations

from types import SimpleNamespace

import attrs
import pytest
import torch

from kvpolicy import (
    Adaptive,
    CachePipeline,
    KeyDiff,
    LocalAttention,
    Quest,
    RandomGate,
    Ratio,
    SnapKV,
    TopChannels,
    XAttention,
    save_pipeline,
)
from kvpolicy.adapters.vllm.options import Options, check_pipeline, options_of, refusals
from kvpolicy.pipeline_files import data_of

PIPELINE = CachePipeline(admission=LocalAttention(window=32, sinks=2))


def test_a_file_a_mapping_or_nothing(tmp_path):
    path = tmp_path / "pipeline.yaml"
    save_pipeline(PIPELINE, path)
    assert options_of({"kvpolicy": str(path)}) == Options(PIPELINE)
    assert options_of({"kvpolicy": {"pipeline": str(path)}}) == Options(PIPELINE)
    gate = CachePipeline(admission=RandomGate(sparsity=0.5))
    given = {"pipeline": data_of(gate), "admitted": 0.6}
    assert options_of({"kvpolicy": given, "other": 1}) == Options(gate, 0.6)
    assert options_of({}) is None and options_of({"other": 1}) is None


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (3, TypeError, "wanted a pipeline's file or a mapping with 'pipeline', got 3"),
        ({"admitted": 0.5}, TypeError, "mapping with 'pipeline'"),
        ({"pipeline": {}, "admited": 1}, ValueError, r"when_full, got \['admited'"),
        ({"pipeline": {}, "row_memory": 0}, ValueError, "row_memory: wanted a number above 0"),
        ({"pipeline": {}, "when_full": "stop"}, ValueError, "when_full: wanted one of"),
        ({"pipeline": {"admission": {"type": "Admit"}}}, ValueError, "Admit"),
    ],
)
def test_other_options_are_refused(given, error, says):
    with pytest.raises(error, match=says):
        options_of({"kvpolicy": given})


@pytest.mark.parametrize(
    ("pipeline", "says"),
    [
        (CachePipeline(selection=XAttention()), "selection: on vLLM .*, got XAttention"),
        (CachePipeline(eviction=SnapKV(budget=512, when="decode")), "eviction: .*'prompt_end'"),
        (CachePipeline(eviction=SnapKV(budget=Adaptive(512))), "as many tokens for each"),
        (CachePipeline(eviction=KeyDiff(budget=512)), "eviction: wanted none on vLLM.*KeyDiff"),
    ],
)
def test_pipelines_that_are_not_served(pipeline, says):
    check_pipeline(PIPELINE)
    for budget in (512, Ratio(0.5)):
        check_pipeline(attrs.evolve(PIPELINE, eviction=SnapKV(budget=budget)))
    for selection in (Quest(budget=512), TopChannels(budget=512)):
        check_pipeline(attrs.evolve(PIPELINE, selection=selection))
    with pytest.raises(ValueError, match=says):
        check_pipeline(pipeline)


def config(**changed):
    """The parts of a VllmConfig that are looked at, as plain vLLM leaves them."""
    own = {
        "cache_config": {
            "enable_prefix_caching": False, "cache_dtype": "auto", "sliding_window": None,
            "block_size": 16,
        },
        "parallel_config": {
            "pipeline_parallel_size": 1, "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1, "use_ubatching": False,
        },
        "model_config": {"attention_chunk_size": None, "dtype": torch.float16},
        "scheduler_config": {"async_scheduling": True},
    }  # fmt: skip
    rest = {"speculative_config": None, "kv_transfer_config": None, "lora_config": None}
    for name, value in changed.items():
        part = next((fields for fields in own.values() if name in fields), rest)
        assert name in part
        part[name] = value
    return SimpleNamespace(**{name: SimpleNamespace(**x) for name, x in own.items()}, **rest)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("enable_prefix_caching", True, "--no-enable-prefix-caching"),
        ("speculative_config", object(), "speculative decoding"),
        ("cache_dtype", "fp8", "kv_cache_dtype: wanted 'auto' or the model's dtype, got 'fp8'"),
        ("cache_dtype", "bfloat16", "the model's dtype, got 'bfloat16'"),
        ("pipeline_parallel_size", 2, "pipeline parallelism"),
        ("decode_context_parallel_size", 2, "context parallelism"),
        ("prefill_context_parallel_size", 2, "context parallelism"),
        ("kv_transfer_config", SimpleNamespace(kv_connector="Nixl"), "KV connectors"),
        ("lora_config", object(), "LoRA"),
        ("sliding_window", 4096, "sliding window"),
        ("use_ubatching", True, "micro-batches"),
        ("attention_chunk_size", 8192, "chunked local attention"),
        ("block_size", 24, "multiple of 16, got 24"),
    ],
)
def test_what_vllm_is_asked_besides(name, value, says):
    assert refusals(config()) == [] == refusals(config(cache_dtype="float16"))
    (text,) = refusals(config(**{name: value}))
    assert says in text


def test_an_eviction_wants_to_be_told_where_prompts_end():
    (text,) = refusals(config(), evicts=True)
    assert "an eviction wants the KV connector 'kvpolicy'" in text
    assert (
        refusals(config(kv_transfer_config=SimpleNamespace(kv_connector="kvpolicy")), evicts=True)
        == []
    )


def test_requests_end_with_an_error_where_vllm_can_be_told():
    transfer = SimpleNamespace(kv_connector="kvpolicy", kv_load_failure_policy="fail")
    assert refusals(config(kv_transfer_config=transfer)) == []
    given = config(kv_transfer_config=transfer, async_scheduling=False)
    assert refusals(given, "error") == []
    (text,) = refusals(config(kv_transfer_config=transfer), "error")
    assert "--no-async-scheduling" in text
    transfer.kv_load_failure_policy = "recompute"
    (text,) = refusals(given, "error")
    assert "kv_load_failure_policy 'fail'" in text
