"""What a user says by `--additional-config`, and what is refused at start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import attrs

from ..._fields import number, shown
from ...eviction import KeepAll
from ...pipeline import CachePipeline
from ...pipeline_files import load_pipeline, pipeline_from
from ...selection import SelectAll

NAME = "kvpolicy"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def _positive(value: float) -> bool:
    return value > 0


MOST = 0.1  # of the blocks' memory, what rows may take besides


@attrs.frozen
class Options:
    """A pipeline, and what it cannot say itself.

    `admitted` is the part of the tokens that a gate is expected to admit, with a margin. Rows may
    take `row_memory` times the memory of the blocks.
    """

    pipeline: CachePipeline
    admitted: float | None = None
    row_memory: float = attrs.field(default=MOST, validator=number("a number above 0", _positive))


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
    for name, policy, served in (
        ("selection", pipeline.selection, SelectAll),
        ("eviction", pipeline.eviction, KeepAll),
    ):
        if not isinstance(policy, served):
            raise ValueError(
                f"kvpolicy: {name}: wanted none on vLLM, where admissions are served, got "
                f"{type(policy).__name__}"
            )
    if pipeline.admission.needs - {"key_pre"}:
        raise ValueError(
            f"kvpolicy: admission: {type(pipeline.admission).__name__} reads "
            f"{sorted(pipeline.admission.needs)}; on vLLM there are keys before and after RoPE"
        )


def refusals(config: Any) -> list[str]:
    """What a vLLM configuration asks for that is not served, a sentence for each."""
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    checks = {
        "prefix caching is not served, since a block holds many heads' tokens; write "
        "enable_prefix_caching=False (--no-enable-prefix-caching)": cache.enable_prefix_caching,
        "speculative decoding is not served: tokens are not taken back": config.speculative_config,
        "kv_cache_dtype: wanted 'auto' or the model's dtype, got "
        f"{cache.cache_dtype!r}": cache.cache_dtype not in ("auto", "float16", "bfloat16"),
        "pipeline parallelism is not served": parallel.pipeline_parallel_size > 1,
        "context parallelism is not served": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "KV connectors are not served": config.kv_transfer_config,
        "LoRA is not served": config.lora_config,
        "a sliding window is not served": cache.sliding_window,
        "micro-batches (enable_dbo) are not served": parallel.use_ubatching,
        "chunked local attention is not served": model.attention_chunk_size,
        f"block_size: wanted a multiple of 16, got {cache.block_size}": cache.block_size % 16,
    }
    return [text for text, found in checks.items() if found]
