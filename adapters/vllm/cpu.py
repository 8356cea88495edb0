"""vLLM on a CPU, where it knows one attention backend and takes a named one as a wish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..._extras import extra
from ...errors import UnsupportedError
from .options import options_of, other_model

with extra("vllm"):
    from vllm.config import get_current_vllm_config_or_none
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


class PlainBackend(CPUAttentionBackend):
    """vLLM's own, for models without a pipeline.

    Raises:
        UnsupportedError: a model that is not served is asked for with one.
    """

    @staticmethod
    def get_impl_cls() -> type[Any]:
        config = get_current_vllm_config_or_none()
        if config is not None and options_of(config.additional_config) is not None:
            raise UnsupportedError(other_model(config))
        return CPUAttentionBackend.get_impl_cls()


@contextmanager
def instead(backend: type[Any]) -> Iterator[None]:
    """Has `backend` stand in place of vLLM's own while layers are made.

    vLLM remembers what it chose, which holds neither for this model nor for the next of a process.
    """
    _stand(backend)
    try:
        yield
    finally:
        _stand(PlainBackend)


def _stand(backend: type[Any]) -> None:
    selector._cached_get_attn_backend.cache_clear()
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{backend.__module__}.{backend.__qualname__}")
