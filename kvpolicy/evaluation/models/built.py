"""A model of a GGUF file as a folder that transformers reads: built once, then cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from . import gguf_file

_MANIFEST = "manifest.json"


@attrs.frozen(kw_only=True)
class Built:
    """A model that is known by the bytes of its GGUF file.

    `name` begins its folders under `$XDG_CACHE_HOME/kvpolicy` (default `~/.cache/kvpolicy`), `find`
    gives the path of the file and is asked only where nothing is cached.
    """

    name: str
    architecture: str
    bytes: int
    sha256: str
    find: Callable[[], Path]

    def load(
        self, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Any, PreTrainedTokenizerFast]:
        """The model in evaluation mode and its tokenizer.

        Raises:
            ValueError: the file is not the expected one.
        """
        folder = _cache_root() / f"{self.name}-{str(dtype).removeprefix('torch.')}"
        if not self._is_complete(folder):
            self._build(folder, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return model.to(device).eval(), tokenizer

    def config(self) -> PreTrainedConfig:
        """The model's shape; its weights are not read."""
        for folder in sorted(_cache_root().glob(f"{self.name}-*")):
            if self._is_complete(folder):
                return AutoConfig.from_pretrained(folder, local_files_only=True)
        return gguf_file.read_config(gguf_file.open_gguf(self.find()))

    def _is_complete(self, folder: Path) -> bool:
        try:
            manifest = json.loads((folder / _MANIFEST).read_text())
            return manifest["gguf_sha256"] == self.sha256 and manifest["bytes"] == _sizes(folder)
        except (OSError, ValueError, KeyError):
            return False

    def _build(self, folder: Path, dtype: torch.dtype) -> None:
        path = self.find()
        self._check(path)
        reader = gguf_file.open_gguf(path)
        config = gguf_file.read_config(reader)
        config.architectures = [self.architecture]
        config.dtype = dtype

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            new = Path(scratch) / folder.name
            new.mkdir()
            config.save_pretrained(new)
            gguf_file.read_tokenizer(reader).save_pretrained(new)
            weights = gguf_file.read_weights(reader, dtype)
            save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
            manifest = {"gguf_sha256": self.sha256, "bytes": _sizes(new)}
            (new / _MANIFEST).write_text(json.dumps(manifest))
            self._install(new, folder)

    def _install(self, new: Path, folder: Path) -> None:
        """Move a finished folder into place; a process that finished first wins."""
        if not self._is_complete(folder):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            new.rename(folder)
        except OSError:
            if not self._is_complete(folder):
                raise

    def _check(self, path: Path) -> None:
        size = path.stat().st_size
        if size != self.bytes:
            raise ValueError(f"{path.name}: got {size} bytes, want {self.bytes}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{path.name}: got sha256 {digest}, want {self.sha256}")


def _cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvpolicy"


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != _MANIFEST}
