"""What vLLM's scheduler is told: the size of a block, and how many blocks a request has."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ..._extras import extra
from .plan import Plan, check_rows

with extra("vllm"):
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import (
        FullAttentionManager,
        register_all_kvcache_specs,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry


# Tokens of the prompts of requests, by the pool that their blocks are of; a KV connector writes it.
PROMPTS: MutableMapping[BlockPool, dict[str, int]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class ArenaSpec(FullAttentionSpec):
    """One block of all layers and heads, in bytes: the first layer names it, the others share it.

    `dtype` is int8, `num_kv_heads` the KV heads of all layers on one rank, and `head_size` the
    bytes of a token's key and value and of its position. `rows` are the requests that may run at
    once; each takes `row_bytes` outside the blocks, and all at most `row_memory` times the blocks.
    """

    plan: Plan
    rows: int
    row_bytes: int
    row_memory: float

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """What there must be for one request of the greatest length; vLLM refuses less."""
        longest = vllm_config.model_config.max_model_len
        # One block is vLLM's own, and each row names one; the first of a request is one of those.
        return (1 + self.rows + self.plan.blocks(longest) - 1) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[ArenaSpec]) -> ArenaSpec:
        if any(spec != specs[0] for spec in specs):
            raise ValueError("kvpolicy: wanted one kind of block for the whole model")
        return specs[0]


class ArenaManager(FullAttentionManager):
    """Gives a request the blocks of its plan, the first from a set that names rows.

    Blocks 1 to `rows` are taken from vLLM's pool for good: the first block of a request says in
    its block table which row of the workers' state is its own. Everything else is the base class's:
    blocks go back when vLLM ends or preempts a request, and nothing is freed before.
    """

    def __init__(self, kv_cache_spec: ArenaSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        self.plan, count = kv_cache_spec.plan, kv_cache_spec.rows
        if self.enable_caching:
            raise ValueError("kvpolicy: prefix caching is not served")
        space = block_pool.num_gpu_blocks * kv_cache_spec.page_size_bytes
        check_rows(count, kv_cache_spec.row_bytes, kv_cache_spec.row_memory, space)
        named = block_pool.free_block_queue.popleft_n(count)
        if [block.block_id for block in named] != list(range(1, count + 1)):
            raise RuntimeError("kvpolicy: vLLM gave other blocks first than 1, 2, 3, ...")
        # Else vLLM takes them for a request's, and refuses to reset or to sleep while one runs.
        block_pool.num_gpu_blocks -= count
        self.free_rows = named[::-1]
        self.prompts = PROMPTS.setdefault(block_pool, {})

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Blocks of the pool that the request needs beyond those that it has."""
        held = len(self.req_to_blocks.get(request_id, ()))
        if held == 0 and not self.free_rows:
            return self.block_pool.num_gpu_blocks  # more than there are: it has to wait
        return max(self._blocks(request_id, num_tokens) - max(held, 1), 0)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocates what `get_num_blocks_to_allocate` counted, and the row."""
        held = self.req_to_blocks[request_id]
        new = [] if held else [self.free_rows.pop()]
        missing = self._blocks(request_id, num_tokens) - len(held) - len(new)
        new += self.block_pool.get_new_blocks(max(missing, 0))
        held.extend(new)
        return new

    def _blocks(self, request_id: str, tokens: int) -> int:
        return self.plan.blocks(tokens, self.prompts.get(request_id))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks of the pool; its row is free again."""
        blocks = super().pop_blocks_for_free(request_id)
        self.free_rows += blocks[:1]
        return blocks[1:]


def register_spec() -> None:
    """Makes the spec known to vLLM, beside its own ones."""
    # A registry that is not empty is taken as complete.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(ArenaSpec, ArenaManager, ArenaSpec)
