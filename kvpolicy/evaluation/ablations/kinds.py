"""Kinds of text that a gate trained on prose may meet, from what every machine has."""

from __future__ import annotations

import gzip
import random
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from ..texts.prose import join

_MOST = 2_000_000  # characters of a kind
_MANUALS = Path("/usr/share/man")
_MACRO = re.compile(r"\\f[A-Z]|\\-|\\&|^[.'].*$", re.MULTILINE)


def kinds_of_text(prose: str, languages: tuple[str, ...] = ("de", "fr", "es")) -> dict[str, str]:
    """Held-out text by kind; kinds that this machine lacks are left out.

    Code is Python's own library, C headers are Python's, tables and chats are made from `prose`,
    other languages are manual pages.
    """
    paths = sysconfig.get_paths()
    found = {
        "code": _files(Path(paths["stdlib"]).glob("*.py")),
        # A blank line after a declaration: things are hidden between sentences or paragraphs.
        "C headers": _files(Path(paths["include"]).glob("**/*.h")).replace(";\n", ";\n\n"),
        "tables": tables(prose),
        "chat": chats(prose),
    }
    for language in languages:
        found[language] = _pages(_MANUALS / language)
    return {kind: text for kind, text in found.items() if len(text) > 100_000}


def tables(prose: str, seed: int = 0) -> str:
    """Tables of numbers and words of a text, comma-separated or in Markdown."""
    rng, words = random.Random(seed), sorted(set(re.findall(r"\b[a-z]{4,10}\b", prose)))
    blocks = []
    for number in range(1200):
        columns, mark = rng.randint(3, 6), rng.choice((",", " | "))
        heads = rng.sample(words, columns)
        rows = [
            [
                rng.choice(words),
                *(f"{rng.uniform(0, 999):.{rng.randint(0, 3)}f}" for _ in heads[1:]),
            ]
            for _ in range(rng.randint(4, 10))
        ]
        lines = [mark.join(row) for row in (heads, *rows)]
        blocks.append(f"Table {number + 1}.\n" + "\n".join(lines))
    return join(blocks)


def chats(prose: str, seed: int = 0) -> str:
    """A talk whose turns are sentences of a text."""
    rng = random.Random(seed)
    said = [x for x in re.split(r"(?<=[.!?])\s+", prose) if 20 < len(x) < 200]
    turns = []
    for number in range(min(len(said), 8000)):
        who = "User" if number % 2 == 0 else "Assistant"
        turns.append(f"{who}: {' '.join(rng.choices(said, k=rng.randint(1, 3)))}")
    return join(turns)


def _files(paths: Iterable[Path]) -> str:
    found, size = [], 0
    for path in sorted(paths):
        if size > _MOST:
            break
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        found.append(text)
        size += len(text)
    return "\n\n".join(found)


def _pages(folder: Path) -> str:
    """Manual pages of a language without their macros."""
    found, size = [], 0
    for path in sorted(folder.glob("man*/*.gz")):
        if size > _MOST:
            break
        try:
            text = gzip.decompress(path.read_bytes()).decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        plain = re.sub(r"\n{2,}", "\n\n", _MACRO.sub("", text))
        found.append(plain)
        size += len(plain)
    return "\n\n".join(found)
