"""A saved cache of a tensor-parallel model: a file of each rank's heads, and an index of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..._files import write_text
from ...errors import UnsupportedError
from .ranks import Ranks

FORMAT = "kvpolicy-ranks-1"
_KEY = re.compile(r"[0-9a-f]{16}")
_LONGEST = 1000  # bytes of an index


def part_of(path: Path, key: str, part: int, parts: int) -> Path:
    """Where a rank's heads lie."""
    return path.with_name(f"{path.name}.{key}.rank{part}-of-{parts}")


def write_index(path: Path, key: str, parts: int) -> None:
    """Says which files belong together; the cache that `path` named before goes then."""
    before = read_index(path)
    write_text(path, json.dumps({"format": FORMAT, "key": key, "ranks": parts}) + "\n")
    if before is not None and before[0] != key:
        for part in range(before[1]):
            part_of(path, before[0], part, before[1]).unlink(missing_ok=True)


def read_index(path: Path) -> tuple[str, int] | None:
    """The key and the number of ranks of the files that `path` names; None if it is no index."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_LONGEST))
        if found["format"] != FORMAT:
            return None
        key, parts = str(found["key"]), int(found["ranks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (key, parts) if _KEY.fullmatch(key) and parts > 1 else None


def own_file(path: Path, ranks: Ranks) -> Path:
    """The file that this rank loads of a saved cache.

    Raises UnsupportedError where it was saved by another number of ranks.
    """
    found = read_index(path)
    saved = 1 if found is None else found[1]
    if saved != ranks.parts:
        if not path.is_file():
            raise FileNotFoundError(f"path: no file {path}")
        said = "one process" if saved == 1 else f"{saved} ranks of a tensor-parallel model"
        raise UnsupportedError(
            f"path: {path} was saved by {said}, this model is on {ranks.parts}; load it on as many"
        )
    return path if found is None else part_of(path, found[0], ranks.part, saved)
