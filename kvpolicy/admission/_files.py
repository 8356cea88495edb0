"""Finding published files: on disk, in a repository of the Hugging Face hub, or by name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import attrs

from .. import pretrained
from .._fields import is_a, optional

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@attrs.frozen(kw_only=True)
class Source:
    """Where weights were read: a file or folder, or its copy from a repository of the hub.

    `file` is its name in `repo`, None for a folder; `chosen` what else decided what was read.
    """

    path: Path
    repo: str | None = None
    file: str | None = None
    revision: str | None = None
    chosen: tuple[tuple[str, float | int], ...] = ()


def source_field() -> Any:
    """A policy's `source`: None where its weights come from no file. Nothing depends on it."""
    return attrs.field(
        default=None,
        eq=False,
        repr=False,
        validator=optional(is_a(Source, "what from_pretrained remembers, or None")),
        metadata={"fingerprint": False},
    )


def source_of(
    path: Path,
    source: str | os.PathLike[str],
    file: str | None,
    revision: str | None,
    **chosen: float | int,
) -> Source:
    """What to remember of `path`, which was found by the other arguments."""
    if Path(source).exists():
        return Source(path=path.resolve(), chosen=tuple(chosen.items()))
    repo = str(source)
    return Source(path=path, repo=repo, file=file, revision=revision, chosen=tuple(chosen.items()))


def find_file(source: str | os.PathLike[str], file: str | None, revision: str | None) -> Path:
    """The path of a file, of `file` in a directory or hub repository, or of a trained policy."""
    path = Path(source)
    if file is None and _is_name(source):
        return pretrained.path(str(source))
    if path.is_dir():
        if file is None:
            raise ValueError(f"file: {path} is a directory; wanted the name of a file in it")
        path = path / file
    elif not path.exists() and file is not None and _is_repository(source):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(str(source), file, revision=revision))
    elif file is not None and path.is_file():
        raise ValueError(f"file: {path} is a file already, got file={file!r} as well")
    if not path.is_file():
        hint = " (a file of a hub repository needs `file`; kvpolicy.pretrained.names() lists gates)"
        raise FileNotFoundError(f"path_or_repo: no file {path}{'' if file else hint}")
    return path


def find_folder(
    source: str | os.PathLike[str], files: tuple[str, ...], revision: str | None
) -> Path:
    """A directory that holds `files`, a trained policy's, or the copy of a hub repository's."""
    path = Path(source)
    if _is_name(source):
        path = pretrained.path(str(source))
    elif not path.exists() and _is_repository(source):
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(source), revision=revision, allow_patterns=list(files)))
    if not path.is_dir():
        raise FileNotFoundError(f"path_or_repo: no directory {path}")
    for name in files:
        if not (path / name).is_file():
            raise FileNotFoundError(f"path_or_repo: {path} holds no {name}")
    return path


def _is_name(source: str | os.PathLike[str]) -> bool:
    """Whether nothing lies at `source`, and a trained policy has this name."""
    name = os.fspath(source).removesuffix(".safetensors")
    return not Path(source).exists() and name in {*pretrained.KNOWN, *pretrained.names()}


def _is_repository(source: str | os.PathLike[str]) -> bool:
    return isinstance(source, str) and _REPOSITORY.fullmatch(source) is not None
