"""Models of vLLM whose attention layers keep their tokens in rows and arenas.

Each class is vLLM's own until a configuration names a pipeline.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..._extras import extra
from ...budget import budget_of
from ...errors import UnsupportedError
from ...spec import CacheSpec
from .backend import ArenaBackend
from .before_rope import BeforeRope
from .options import ADMIT, ERROR, Options, check_pipeline, options_of, refusals
from .plan import check_rows, plan_of
from .rows import Rows
from .spec import ArenaSpec

with extra("vllm"):
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.logger import init_logger
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models import llama, mistral, qwen2, qwen3
    from vllm.platforms import current_platform


logger = init_logger("vllm.plugins.kvpolicy")  # a name that vLLM shows
END = {ADMIT: "admit while there is room", ERROR: "a request whose blocks are full is an error"}


class Served:
    """A model whose `additional_config` may name a pipeline; stands before vLLM's class."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        options = options_of(vllm_config.additional_config)
        if options is None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
            return
        check_pipeline(options.pipeline)
        if found := refusals(vllm_config, options.when_full, not options.pipeline.eviction.neutral):
            raise UnsupportedError("kvpolicy: " + "; ".join(found))
        with _our_backend():
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.kvpolicy = _serve(self, vllm_config, options)
        # Buffers of a model survive vLLM's sleep of level 2, which gives back all other memory.
        for number, tensor in enumerate(self.kvpolicy.lasting()):
            self.register_buffer(f"kvpolicy_{number}", tensor, persistent=False)  # type: ignore[attr-defined]


class LlamaForCausalLM(Served, llama.LlamaForCausalLM):
    pass


class MistralForCausalLM(Served, mistral.MistralForCausalLM):
    pass


class Qwen2ForCausalLM(Served, qwen2.Qwen2ForCausalLM):
    pass


class Qwen3ForCausalLM(Served, qwen3.Qwen3ForCausalLM):
    pass


class ArenaAttention(Attention):
    """An attention layer; the first one's spec is that of the whole model."""

    arena: ArenaSpec

    def get_kv_cache_spec(self, vllm_config: Any) -> ArenaSpec:
        return self.arena


def _our_backend() -> AbstractContextManager[None]:
    """Within it layers have our backend; elsewhere than on a CPU its name alone decides."""
    if not current_platform.is_cpu():
        return nullcontext()
    from .cpu import instead

    return instead(ArenaBackend)


def _serve(model: Any, config: Any, options: Options) -> Rows:
    """Makes rows, and gives every attention layer its place in them."""
    found = {name: x for name, x in model.named_modules() if isinstance(x, Attention)}
    layers = list(found.values())
    other = {x.attn_backend for x in layers} - {ArenaBackend}
    if other:
        raise ValueError(
            f"kvpolicy: attention backend: wanted CUSTOM (--attention-backend CUSTOM), got "
            f"{sorted(x.get_name() for x in other)}"
        )
    first, pipeline, model_config = layers[0], options.pipeline, config.model_config
    for layer in layers:
        mine, own = (
            (x.num_heads, x.num_kv_heads, x.head_size, x.head_size_v, x.impl.scale)
            for x in (first, layer)
        )
        if own != mine:
            raise UnsupportedError(f"kvpolicy: layers with other heads are not served: {own}")
    ranks = config.parallel_config.tensor_parallel_size
    heads = model_config.get_total_num_kv_heads()
    admission = pipeline.admission
    plan = plan_of(
        admission, pipeline.window, len(layers), heads, ranks, config.cache_config.block_size,
        options.admitted, budget_of(pipeline.eviction),
    )  # fmt: skip
    spec = CacheSpec(
        layers=len(layers),
        heads=first.num_heads,
        kv_heads=first.num_kv_heads,
        head_dim=first.head_size,
        dtype=first.dtype,
        device=current_platform.device_type,
        scale=first.impl.scale,
        page_size=16,
        rollback=0,
        head_offset=get_tensor_model_parallel_rank() * first.num_kv_heads,
        all_kv_heads=heads,
    )
    pipeline.check(spec)
    count, longest = config.scheduler_config.max_num_seqs, model_config.max_model_len
    if current_platform.is_cuda():  # more of them might not even be made
        one, part = Rows(spec, pipeline, plan, 0, longest).nbytes, options.row_memory
        free = torch.cuda.mem_get_info()[0] * config.cache_config.gpu_memory_utilization
        check_rows(count, one, part, free / (1 + part))
    rows = Rows(spec, pipeline, plan, count, longest)
    logger.info(
        "kvpolicy: %s; %d rows of %.2f MiB each outside the blocks; a request of %d tokens has %d "
        "blocks, with everything kept %d; %s",
        admission, count, rows.nbytes / (count + 1) / 2**20, longest, plan.blocks(longest),
        -(-longest // plan.block), END[options.when_full],
    )  # fmt: skip
    arena = ArenaSpec(
        block_size=plan.block,
        num_kv_heads=plan.heads,
        head_size=rows.token_bytes,
        head_size_v=0,
        dtype=torch.int8,
        plan=plan,
        rows=count,
        row_bytes=rows.nbytes // (count + 1),
        row_memory=options.row_memory,
    )
    for index, layer in enumerate(layers):
        layer.__class__ = ArenaAttention
        layer.arena = arena
        layer.impl.place(rows, index)
        if index:
            layer.kv_sharing_target_layer_name = first.layer_name
    if "key_pre" in admission.needs:
        _watch_keys(model, config, {id(x): x for x in layers})
    return rows


def _watch_keys(model: nn.Module, config: Any, layers: dict[int, Attention]) -> None:
    """Has the keys that enter each layer's rotary embedding kept for its gate.

    Layers run one after the other, so that they share the buffer; and its owner's name, with which
    compiled layers are alike.
    """
    owner = next(iter(layers.values()))
    size = config.scheduler_config.max_num_batched_tokens, owner.num_kv_heads * owner.head_size
    buffer = torch.empty(size, dtype=owner.dtype, device=current_platform.device_type)
    for module in model.modules():
        attention, rotary = getattr(module, "attn", None), getattr(module, "rotary_emb", None)
        if id(attention) not in layers or rotary is None:
            continue
        layers.pop(id(attention)).impl.key_pre = buffer
        module.rotary_emb = BeforeRope(rotary, owner.layer_name)
    if layers:
        raise UnsupportedError("kvpolicy: a layer without `rotary_emb` beside `attn`")
