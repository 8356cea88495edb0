"""Qwen2.5-Coder-0.5B-Instruct: a stronger small model of 32,768 positions, to measure with.

Nothing of it is shipped, and no test of the suite reads it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from .built import Built

ENVIRONMENT = "KVPOLICY_QWEN_CODER"  # the path of a GGUF file
REPOSITORY = "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


def load_qwen_coder(
    dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """Load Qwen2.5-Coder-0.5B-Instruct from a GGUF file of 491,400,064 bytes (Q4_K_M).

    The file is the one that the environment variable KVPOLICY_QWEN_CODER names, or else the hub's.
    The first call dequantizes it and caches the result as `load_smollm2` does.

    Raises:
        FileNotFoundError: no file.
        ImportError: the package `gguf` is missing.
        ValueError: another file.
    """
    return _BUILT.load(dtype, device)


def qwen_coder_config() -> Qwen2Config:
    """The model's shape; its weights are not read. Raises as `load_qwen_coder`."""
    return cast(Qwen2Config, _BUILT.config())


def _file() -> Path:
    if given := os.environ.get(ENVIRONMENT):
        if not Path(given).is_file():
            raise FileNotFoundError(f"{ENVIRONMENT}: there is no file {given}")
        return Path(given)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(REPOSITORY, FILE))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"{FILE} was not had from the hub ({reason}); put its path into {ENVIRONMENT}"
        ) from error


_BUILT = Built(
    name="qwen2.5-coder-0.5b-instruct",
    architecture="Qwen2ForCausalLM",
    bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    find=_file,
)
