"""vLLM's attention backend: attention over rows and their arenas."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._extras import extra
from ...errors import UnsupportedError
from .options import options_of, other_model
from .plan import PAGE
from .prompt_end import end_prompt, parts_of
from .reading import read_prompt
from .rows import Rows
from .step import Step

with extra("vllm"):
    from vllm.logger import init_logger
    from vllm.v1.attention.backend import (
        AttentionBackend,
        AttentionCGSupport,
        AttentionImpl,
        AttentionMetadataBuilder,
        AttentionType,
        CommonAttentionMetadata,
        MultipleOf,
    )
with extra("vllm"), suppress(ImportError, OSError):
    import vllm.vllm_flash_attn  # noqa: F401  its FlashAttention-3, for prompts on Hopper devices

logger = init_logger("vllm.plugins.kvpolicy")  # a name that vLLM shows

STEPS = 256  # between two looks at the counter of refused tokens


class ArenaBackend(AttentionBackend):
    """Named CUSTOM, the name that vLLM has for backends of others."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[ArenaImpl]:
        return ArenaImpl

    @staticmethod
    def get_builder_cls() -> type[ArenaBuilder]:
        return ArenaBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(PAGE)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """Bytes: see `ArenaSpec`, whose values have no size of their own."""
        return num_blocks, block_size * num_kv_heads * head_size

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # one that reports: `refusals` names the others


class ArenaBuilder(AttentionMetadataBuilder[Step]):
    """From a batch of vLLM's to a step of rows.

    What a captured decode step reads has its place in `Rows`, which `build` fills for each replay.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold = 1  # those that decode come first

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        first = layers[layer_names[0]].impl
        if not hasattr(first, "rows"):
            if options_of(vllm_config.additional_config) is not None:
                raise UnsupportedError(other_model(vllm_config))
            raise UnsupportedError(
                "kvpolicy: the backend CUSTOM wants 'kvpolicy' in additional_config"
            )
        self.rows: Rows = first.rows
        self.steps = self.told = 0

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        batch = common_attn_metadata
        starts = batch.query_start_loc_cpu.tolist()
        added = [end - begin for begin, end in zip(starts, starts[1:], strict=False)]
        # Without speculation the bound is the length.
        ends = batch.seq_lens_cpu_upper_bound
        ends = batch.seq_lens if ends is None else ends
        lengths = [end - new for end, new in zip(ends.tolist(), added, strict=True)]
        self._tell()
        return self.rows.begin(batch.block_table_tensor, lengths, added)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        return self.rows.rehearse(common_attn_metadata.num_reqs)

    def _tell(self) -> None:
        """Logs, once in a while, that arenas were full: looking waits for the device."""
        self.steps += 1
        if self.rows.plan.exact or self.steps % STEPS:
            return
        if (found := self.rows.count_refused()) > self.told:
            logger.warning(
                "kvpolicy: %d admitted tokens were left out until now: they found no page in the "
                "blocks of their request; raise 'admitted' or the gate's threshold",
                found,
            )
            self.told = found


class ArenaImpl(AttentionImpl[Step]):
    """One layer's attention. `place` gives it the rows of its worker and its number."""

    rows: Rows
    index: int
    key_pre: Tensor | None = None  # a buffer for keys before RoPE, where a gate reads them

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
            **others,
        }
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"kvpolicy: attention with {name}={value!r} is not served")
        if attn_type != AttentionType.DECODER:
            raise ValueError(f"kvpolicy: attention of type {attn_type} is not served")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def place(self, rows: Rows, index: int) -> None:
        """Makes this the attention of layer `index` of `rows`."""
        self.rows, self.index = rows, index

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Step | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:
            if self.index == 0 and self.rows.memory is None:  # vLLM measures memory
                query.new_empty(self.rows.scratch(len(query)), dtype=torch.uint8)
            return output.zero_()
        if self.rows.memory is not kv_cache:  # vLLM may make one for a trial first
            self.rows.bind(kv_cache)
        n, out = attn_metadata.decodes, output.view(len(output), self.num_heads, self.head_size)
        pre = None if self.key_pre is None else self.key_pre[: len(key)].view(key.shape)

        def of(part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            return query[part], key[part], value[part], None if pre is None else pre[part]

        if n:
            out[:n] = self.rows.decode(attn_metadata, self.index, *of(slice(n)))
        for prompt in chain.from_iterable(parts_of(self.rows, x) for x in attn_metadata.prompts):
            part = slice(prompt.first, prompt.first + prompt.seg.cu_q[1])
            out[part] = read_prompt(self.rows, prompt, self.index, *of(part))
            if prompt.ends:
                end_prompt(self.rows, self.rows.layers[self.index], prompt.row)
        return output
