"""Finding published files: on disk, in a repository of the Hugging Face hub, or by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from .. import pretrained
from .._arguments import check_path, check_text
from .._arguments import optional as none_or
from .._elsewhere import near
from .._fields import is_a, optional

SOURCE = "a path, or the id of a hub repository"
_NAMES = "kvpolicy.pretrained.names() lists trained policies"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@attrs.frozen(kw_only=True)
class Source:
    """Where weights were read: a file or folder, that of a trained policy, or a copy from the hub.

    `name` is the trained policy's; `file` that of a file in `repo`, None for a folder; `chosen`
    what else decided what was read.
    """

    path: Path
    name: str | None = None
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
    made = Source(path=path.resolve(), chosen=tuple(chosen.items()))
    if Path(source).exists():
        return attrs.evolve(made, name=_name_at(path))
    if file is None and _is_name(source):
        return attrs.evolve(made, name=os.fspath(source).removesuffix(".safetensors"))
    return attrs.evolve(made, repo=str(source), file=file, revision=revision)


def _near(path: Path) -> str:
    """The trained policy whose name was meant, as a hint, or ""."""
    return near(path.name, sorted(pretrained.KNOWN))


def find_file(source: str | os.PathLike[str], file: str | None, revision: str | None) -> Path:
    """The path of a file, of `file` in a directory or hub repository, or of a trained policy."""
    check_path("path_or_repo", source, SOURCE)
    none_or(check_path, "file", file, "a file's name")
    none_or(check_text, "revision", revision)
    path = Path(source)
    if file is None and _is_name(source):
        path = pretrained.path(str(source))
        if path.is_dir():
            raise ValueError(
                f"path_or_repo: wanted a gate's file, got {str(source)!r}, a DuoAttention pattern; "
                f"write DuoAttention.from_pretrained({str(source)!r}, sparsity=0.5)"
            )
        return path
    if path.is_dir():
        if file is None:
            raise ValueError(f"file: {path} is a directory; wanted the name of a file in it")
        path = path / file
    elif not path.exists() and file is not None and _is_repository(source):
        from huggingface_hub import hf_hub_download

        with _from_hub(f"no file {file} of", source):
            return Path(hf_hub_download(str(source), file, revision=revision))
    elif file is not None and path.is_file():
        raise ValueError(f"file: {path} is a file already, got file={file!r} as well")
    if not path.is_file():
        hint = f" (a file of a hub repository needs `file`; {_NAMES})"
        near = _near(path) if file is None else ""
        raise FileNotFoundError(f"path_or_repo: no file {path}{'' if file else hint}{near}")
    return path


def located(
    source: str | os.PathLike[str], file: str | None, revision: str | None
) -> tuple[Path, Source]:
    """The path that `find_file` finds, and what a policy remembers of it."""
    path = find_file(source, file, revision)
    return path, source_of(path, source, file, revision)


def find_folder(
    source: str | os.PathLike[str], files: tuple[str, ...], revision: str | None
) -> Path:
    """A directory that holds `files`, a trained policy's, or the copy of a hub repository's."""
    check_path("path_or_repo", source, SOURCE)
    none_or(check_text, "revision", revision)
    path = Path(source)
    if _is_name(source):
        path = pretrained.path(str(source))
        if path.is_file():
            raise ValueError(
                f"path_or_repo: wanted a pattern's folder, got {str(source)!r}, a write gate; "
                f"write WriteGate.from_pretrained({str(source)!r})"
            )
    elif not path.exists() and _is_repository(source):
        from huggingface_hub import snapshot_download

        with _from_hub("no copy of", source):
            path = Path(
                snapshot_download(str(source), revision=revision, allow_patterns=list(files))
            )
    if not path.is_dir():
        raise FileNotFoundError(f"path_or_repo: no directory {path} ({_NAMES}){_near(path)}")
    for name in files:
        if not (path / name).is_file():
            raise FileNotFoundError(f"path_or_repo: {path} holds no {name}")
    return path


@contextmanager
def _from_hub(what: str, source: str | os.PathLike[str]) -> Iterator[None]:
    """One sentence for the dozen errors of the hub, of HTTP and of the system."""
    try:
        yield
    except Exception as error:
        raise FileNotFoundError(
            f"path_or_repo: {what} the hub repository {source} is here, and the hub gave none "
            f"({type(error).__name__}): a wrong name, no access, or no network; write the path of "
            "a copy"
        ) from error


def _is_name(source: str | os.PathLike[str]) -> bool:
    """Whether nothing lies at `source`, and a trained policy has this name."""
    name = os.fspath(source).removesuffix(".safetensors")
    return not Path(source).exists() and name in {*pretrained.KNOWN, *pretrained.names()}


def _name_at(path: Path) -> str | None:
    """The name of the trained policy that is found at `path`."""
    name = path.name.removesuffix(".safetensors").removesuffix(".packed")
    found = name in pretrained.names() and pretrained.path(name).resolve() == path.resolve()
    return name if found else None


def _is_repository(source: str | os.PathLike[str]) -> bool:
    return isinstance(source, str) and _REPOSITORY.fullmatch(source) is not None
