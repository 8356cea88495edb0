"""Policies trained for small models, found by name; README.md beside this file says how they came.

A wheel holds some of them, the repository and the source distribution all. What is not here is
looked for in the folder that the environment variable KVPOLICY_PRETRAINED names, then on the hub,
from where only the very bytes of the repository are taken.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import attrs

from .._arguments import check_path, check_text, optional

_FOLDER = Path(__file__).parent
ENVIRONMENT = "KVPOLICY_PRETRAINED"
ORGANISATION = "kvpolicy"  # on the hub
PATTERN = "full_attention_heads.tsv"


@attrs.frozen
class Known:
    """A policy of the repository: its hub repository there, and the SHA-256 of its files."""

    repository: str
    files: dict[str, str]


def _gate(digest: str, name: str) -> Known:
    return Known("smollm2-135m-instruct-gates", {f"{name}.safetensors": digest})


KNOWN = {
    "duo-smollm2-135m-instruct": Known(
        "duo-smollm2-135m-instruct",
        {
            PATTERN: "e3aa16a6db00be18118b7622b3a0c499db2878f3100c9b2f3fed78cb8de49176",
            "config.json": "ff8bf9077d00213a76061490fe6b0acfc972de456432e47962451bcb893b2d20",
        },
    ),
} | {
    name: _gate(digest, name)
    for name, digest in {
        "smollm2-135m-instruct-w64-keep10": (
            "2e6604ec6bf084e453f2aeccb8f5620914390e0925f44c39e122d6b4ed660481"
        ),
        "smollm2-135m-instruct-w64-keep17": (
            "66824c174d226cf8fd629c9944eeb84eee350ea992f8b3c46cf498f66c5566f8"
        ),
        "smollm2-135m-instruct-w64-keep25": (
            "2d1b84f390b8d1a087d175e6b1dbe824914cae8457ce4cb775f10aeabbe36dc4"
        ),
    }.items()
}


def names() -> list[str]:
    """What is here without a network: write gates and DuoAttention patterns."""
    found = set()
    for folder in _folders(None):
        for file in folder.glob("*.safetensors"):
            found.add(file.name.removesuffix(".safetensors").removesuffix(".packed"))
        found |= {file.parent.name for file in folder.glob(f"*/{PATTERN}")}
    return sorted(found)


def path(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """The file or folder of a policy, for `from_pretrained`, which takes the name itself too.

    Args:
        name: as `names()` lists it, or one of `KNOWN`; `.safetensors` may be added.
        folder: the only place to look; default the folder of the environment variable
            KVPOLICY_PRETRAINED, then the installation, then the hub.

    Raises:
        FileNotFoundError: no policy has this name, or it is not here and the hub gave none.

    Example:
        `WriteGate.from_pretrained(path("smollm2-135m-instruct-w64-keep25"))`
    """
    check_text("name", name, "a name of names()")
    optional(check_path, "folder", folder)
    name = name.removesuffix(".safetensors")
    for place in _folders(folder):
        for file in (f"{name}.safetensors", f"{name}.packed.safetensors"):
            if (place / file).is_file():
                return place / file
        if (place / name / PATTERN).is_file():
            return place / name
    if name not in KNOWN:
        known = sorted({*names(), *KNOWN})
        raise FileNotFoundError(f"name: wanted one of {', '.join(known)}, got {name!r}")
    if folder is not None:
        raise FileNotFoundError(f"{name}: not in the folder {os.fspath(folder)}")
    return _download(name, KNOWN[name])


def _folders(given: str | os.PathLike[str] | None) -> list[Path]:
    """Where to look, in turn."""
    if given is not None:
        return [Path(given)]
    named = os.environ.get(ENVIRONMENT)
    return [*([Path(named)] if named else []), _FOLDER]


def _download(name: str, known: Known) -> Path:
    """The copy of a policy's hub repository; whoever owns that, the bytes are the project's."""
    from huggingface_hub import hf_hub_download

    repository = f"{ORGANISATION}/{known.repository}"
    try:
        files = [Path(hf_hub_download(repository, file)) for file in known.files]
    except Exception as error:  # of the hub, of HTTP, of the system: the client has a dozen kinds
        raise FileNotFoundError(
            f"{name}: not in this installation, and the hub repository {repository} gave none "
            f"({type(error).__name__}); set {ENVIRONMENT} to a folder that holds it, such as "
            "kvpolicy/pretrained of the source distribution"
        ) from error
    for file, digest in zip(files, known.files.values(), strict=True):
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != digest:
            raise ValueError(f"{repository}: {file.name}: wanted sha256 {digest}, got {found}")
    return files[0].parent if PATTERN in known.files else files[0]
