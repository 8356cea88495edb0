"""vLLM: a pipeline's admission in place of its KV cache, by `--additional-config`.

    vllm serve MODEL --attention-backend CUSTOM --no-enable-prefix-caching \
        --additional-config '{"kvpolicy": "pipeline.yaml"}'

The entry point of this package makes the backend known to vLLM. What is served and what is refused
says docs/vllm.md.
"""

from contextlib import suppress
from typing import Any

from ..._extras import extra
from .options import ARCHITECTURES, NAME


def register() -> None:
    """Makes backend, block manager, connector and models known in one of vLLM's processes."""
    with extra("vllm"):
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .spec import register_spec

    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.backend.ArenaBackend")
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.PlainBackend")
    register_spec()
    with suppress(ValueError):  # it is known already
        KVConnectorFactory.register_connector(NAME, f"{__name__}.connector", "ArenaConnector")
    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__name__}.models:{architecture}")


def counters(worker: Any) -> dict[str, int]:
    """What a worker counted, for `LLM.collective_rpc(kvpolicy.adapters.vllm.counters)`.

    `refused`: tokens of heads that were admitted and left out, since the blocks of their request
    were full. `row_bytes`: memory outside the blocks.
    """
    rows = worker.model_runner.model.kvpolicy
    return {"refused": rows.count_refused(), "row_bytes": rows.nbytes}
