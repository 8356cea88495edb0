"""What a user says by `--additional-config`, and what is refused at start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import attrs

from ..._fields import number, one_of, shown
from ...budget import Ratio, Tokens
from ...eviction import SnapKV
from ...pipeline import CachePipeline
from ...pipeline_files import load_pipeline, pipeline_from

NAME = "kvpolicy"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


ADMIT, ERROR = "admit", "error"


def _positive(value: float) -> bool:
    return value > 0


MOST = 0.1  # of the blocks' memory, what rows may take besides


@attrs.frozen
class Options:
    """A pipeline, and what it cannot say itself.

    `admitted` is the part of the tokens that a gate is expected to admit, with a margin. Rows may
    take `row_memory` times the memory of the blocks. At the end of a request's blocks `when_full`
    decides: a gate's tokens are left out ("admit" while there is room), or the request ends with an
    error ("error").
    """

    pipeline: CachePipeline
    admitted: float | None = None
    row_memory: float = attrs.field(default=MOST, validator=number("a number above 0", _positive))
    when_full: str = attrs.field(default=ADMIT, validator=one_of(ADMIT, ERROR))


def options_of(additional_config: Any) -> Options | None:
    """The options under "kvpolicy": a file's path, or a mapping; None where there are none.

    A mapping has "pipeline", a path or the pipeline's plain values, and may have the others.

    Raises:
        ValueError, TypeError: something else stands there, or the pipeline cannot be read.
    """
    if not isinstance(additional_config, Mapping) or NAME not in additional_config:
        return None
    given = additional_config[NAME]
    if isinstance(given, str | os.PathLike):
        return Options(load_pipeline(given))
    if not isinstance(given, Mapping) or "pipeline" not in given:
        raise TypeError(
            f"additional_config: {NAME}: wanted a pipeline's file or a mapping with 'pipeline', "
            f"got {shown(given)}"
        )
    fields = [field.name for field in attrs.fields(Options)]
    if rest := sorted(name for name in given if name not in fields):
        raise ValueError(f"additional_config: {NAME}: wanted {', '.join(fields)}, got {rest}")
    named = given["pipeline"]
    read = pipeline_from if isinstance(named, Mapping) else load_pipeline
    return Options(**{**given, "pipeline": read(named)})


def check_pipeline(pipeline: CachePipeline) -> None:
    """Raises ValueError, by name, for a pipeline that is not served on vLLM."""
    selection, eviction, admission = pipeline.selection, pipeline.eviction, pipeline.admission
    if selection.tile is not None or not (selection.neutral or selection.extends_minmax):
        raise ValueError(
            "kvpolicy: selection: on vLLM decoding may read fewer pages by their smallest and "
            f"largest keys, as Quest does, got {type(selection).__name__}"
        )
    alike = isinstance(eviction, SnapKV) and isinstance(eviction.budget, Tokens | Ratio)
    if not eviction.neutral and not (alike and eviction.when == "prompt_end"):
        raise ValueError(
            "kvpolicy: eviction: wanted none on vLLM, or SnapKV(when='prompt_end') with as many "
            f"tokens for each head, got {eviction}"
        )
    if admission.needs - {"key_pre"}:
        raise ValueError(
            f"kvpolicy: admission: {type(admission).__name__} reads "
            f"{sorted(admission.needs)}; on vLLM there are keys before and after RoPE"
        )


def other_model(config: Any) -> str:
    """What is said of a vLLM configuration whose model is not one that is served."""
    model = config.model_config
    return (
        f"kvpolicy: 'kvpolicy' in additional_config wants one of {', '.join(ARCHITECTURES)} in "
        f"vLLM's own code, got {model.architectures} with model_impl={model.model_impl!r}"
    )


def refusals(config: Any, when_full: str = ADMIT, evicts: bool = False) -> list[str]:
    """What a vLLM configuration asks for that is not served, a sentence for each."""
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    transfer, ends = config.kv_transfer_config, when_full == ERROR
    reports = transfer and transfer.kv_connector == NAME
    checks = {
        "prefix caching is not served, since a block holds many heads' tokens; write "
        "enable_prefix_caching=False (--no-enable-prefix-caching)": cache.enable_prefix_caching,
        "speculative decoding is not served: tokens are not taken back": config.speculative_config,
        "kv_cache_dtype: wanted 'auto' or the model's dtype, got "
        f"{cache.cache_dtype!r}": cache.cache_dtype
        not in ("auto", str(model.dtype).removeprefix("torch.")),
        "pipeline parallelism is not served": parallel.pipeline_parallel_size > 1,
        "context parallelism is not served": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "KV connectors are not served, but for 'kvpolicy', which moves no keys": transfer
        and not reports,
        "when_full='error' wants the KV connector 'kvpolicy' (--kv-transfer-config) and its "
        "kv_load_failure_policy 'fail', by which vLLM ends requests": ends
        and not (reports and transfer.kv_load_failure_policy == "fail"),
        "an eviction wants the KV connector 'kvpolicy' (--kv-transfer-config), by which workers "
        "know where prompts end": evicts and not reports,
        "when_full='error' wants --no-async-scheduling, or a request might be ended whose row was "
        "another's": ends and config.scheduler_config.async_scheduling,
        "LoRA is not served": config.lora_config,
        "a sliding window is not served": cache.sliding_window,
        "micro-batches (enable_dbo) are not served": parallel.use_ubatching,
        "chunked local attention is not served": model.attention_chunk_size,
        f"block_size: wanted a multiple of 16, got {cache.block_size}": cache.block_size % 16,
    }
    return [text for text, found in checks.items() if found]
