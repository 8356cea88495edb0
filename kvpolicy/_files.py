"""Files that are written whole or not at all, read as the one file that they are, and those of
tensors, which hold no more than that."""

from __future__ import annotations

import uuid
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, under a name of its own, that takes its place at the end.

    After an error, or on a disk that is full, `path` is as it was and nothing else is left.

    Raises:
        FileNotFoundError: the folder of `path` is not there.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: no folder {path.parent}; make it first, or write elsewhere")
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_pt(path: Path, content: Any) -> None:
    """Replaces a `.pt` file; its bytes do not depend on its name."""
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(content, file)


def open_safetensors(path: Path) -> Any:
    """What safetensors' `safe_open` gives, of one file.

    It opens a path twice, for the header and for the bytes, between which another file may take its
    place (`replacing`); then both are opened again.
    """
    from safetensors import safe_open

    while True:
        before = _identity(path)
        try:
            file = safe_open(path, framework="pt", device="cpu")
        except Exception:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return file


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_pt(path: Path) -> Any:
    """What a `.pt` file of plain values and tensors holds, on the CPU; runs no code of the file.

    Raises:
        ValueError: it is damaged, holds anything else, or unpacks to more than its own size.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            if zipfile.is_zipfile(file):
                unpacked = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
                if unpacked > size:
                    raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
            file.seek(0)
            with warnings.catch_warnings():  # of torch, about pickles that are no files of its own
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise a dozen kinds for damaged files
            own = str(error) if type(error) is ValueError else type(error).__name__
            raise ValueError(f"{path}: not a readable file of plain tensors: {own}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` file, on the CPU, and its metadata.

    Raises:
        ValueError: it is damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return found, file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # of its own, and of torch where a dtype has no tensor
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def read_named(path: Path, *names: str) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file that holds those of these names and no other.

    Raises:
        ValueError: it is damaged, or holds others.
    """
    found, _ = read_safetensors(path)
    if set(found) != set(names):
        keys = "key" if len(names) == 1 else "keys"
        got = ", ".join(sorted(found))
        raise ValueError(f"{path}: wanted the {keys} {', '.join(names)}, got {got}")
    return found


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Replaces a `.safetensors` file."""
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(held, partial, metadata=metadata)
