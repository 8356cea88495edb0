"""Folders of DuoAttention patterns, as published: the only reader and writer of them.

`full_attention_heads.tsv` has a line for each layer with a value for each KV head, `config.json`
the first (`sink_size`) and last tokens (`recent_size`) that streaming heads keep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._files import write_text

PATTERN, CONFIG = "full_attention_heads.tsv", "config.json"
_MOST = 1 << 30  # tokens, more than any sequence has


def read(folder: Path) -> tuple[list[list[float]], dict[str, int]]:
    """Head values `[L][Hkv]`, and `sink_size` and `recent_size` in tokens.

    Raises:
        ValueError: a file is malformed; the message names file and place.
    """
    return _read_pattern(folder / PATTERN), _read_config(folder / CONFIG)


def write(folder: Path, values: Iterable[Iterable[float]], config: Mapping[str, Any]) -> None:
    """Writes both files of a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ("\t".join(f"{value:.10f}" for value in row) for row in values)
    write_text(folder / PATTERN, "\n".join(rows) + "\n")
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8: {error}") from error


def _read_pattern(path: Path) -> list[list[float]]:
    rows: list[list[float]] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            row = [float(cell) for cell in line.split("\t")]
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
        if not all(map(math.isfinite, row)):
            raise ValueError(f"{path}: line {number}: wanted finite numbers, got {line!r}")
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"{path}: line {number}: wanted {len(rows[0])} columns as in line 1, got {len(row)}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: wanted one line per layer, got an empty file")
    return rows


def _read_config(path: Path) -> dict[str, int]:
    text = _text(path)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: wanted an object, got {type(config).__name__}")
    for name, least in {"sink_size": 0, "recent_size": 1}.items():
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            found = repr(value) if name in config else "no such key"
            raise ValueError(f"{path}: {name}: wanted an int of at least {least}, got {found}")
        if value > _MOST:
            raise ValueError(f"{path}: {name}: wanted at most {_MOST:,} tokens, got {value}")
    return {name: config[name] for name in ("sink_size", "recent_size")}
