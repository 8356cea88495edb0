"""Choosing a backend, once; an explicit choice never falls back."""

from __future__ import annotations

import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, get_args

import torch

from .choices import Backend
from .errors import BackendError

BACKENDS: tuple[Backend, ...] = get_args(Backend)
_MODULES = {  # of reference/ and kernels/ alike, by op
    "advance_ring": "ring",
    "antidiagonal_blocks": "antidiagonal",
    "append": "cache_write",
    "arena_write": "arena_write",
    "attention_mass": "attention_mass",
    "decode_write": "cache_write",
    "move_kept": "compact",
    "read_tokens": "compact",
    "dense_prefill": "dense_prefill",
    "expected_logits": "expected_attention",
    "keep_best": "keep_best",
    "keys_at": "keys_at",
    "key_directions": "key_dots",
    "key_dots": "key_dots",
    "key_norms": "norms",
    "value_norms": "norms",
    "projected_norms": "projected_norms",
    "lag_spreads": "lag_spreads",
    "copy_pages": "page_io",
    "read_meta": "page_io",
    "read_pages": "page_io",
    "read_summary": "page_io",
    "write_summary": "page_io",
    "write_minmax": "page_minmax",
    "quest_select": "page_select",
    "top_pages": "page_select",
    "paged_decode": "paged_decode",
    "count_leaving": "prompt_write",
    "write_leaving": "prompt_write",
    "prefill_attention": "sparse_prefill",
    "last_similar": "redundancy",
    "redundancy_scores": "redundancy_scores",
    "selected_prefill": "selected_prefill",
    "window_masses": "window_scores",
    "window_scores": "window_scores",
    "write_number": "write_number",
    "write_gate": "write_gate",
}


def resolve(backend: str, device: torch.device) -> str:
    """The backend that runs on `device`: "reference" or "triton".

    "auto" means Triton on CUDA devices where it is installed and the reference elsewhere. Raises
    BackendError if an explicit choice cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: wanted one of {', '.join(BACKENDS)}, got {backend!r}")
    triton = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if device.type == "cuda" and triton else "reference"
    if backend == "triton":
        if not triton:
            raise BackendError("backend='triton': the package triton is not installed")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError(
                f"backend='triton' on device {device}: kernels need a CUDA device, or "
                "TRITON_INTERPRET=1 in the environment before triton is imported"
            )
    return backend


def compilations() -> AbstractContextManager[list[str]]:
    """Names of the kernels that become ready to run inside; none without Triton."""
    module = _compiled()
    found: AbstractContextManager[list[str]] = module.compilations() if module else nullcontext([])
    return found


def disk_cache() -> str | None:
    """The folder where Triton keeps compiled kernels, where it is installed."""
    module = _compiled()
    return module.disk_cache() if module else None


def _compiled() -> Any:
    triton = importlib.util.find_spec("triton") is not None
    return importlib.import_module(".kernels.compiled", __package__) if triton else None


class Implementation:
    """The ops of one backend as attributes; each is imported when it is first used."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(name)
        room = "reference" if self.backend == "reference" else "kernels"
        op = getattr(importlib.import_module(f".{room}.{_MODULES[name]}", __package__), name)
        setattr(self, name, op)
        return op


@lru_cache
def implementation(name: str) -> Implementation:
    """That of a resolved backend, "reference" or "triton"."""
    return Implementation(name)
