"""Markup in, paragraphs of prose out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_MIN_CHARS = 60
_SENTENCE_END = re.compile(r"[.!?]['\")\]]*$")


def paragraphs(text: str, *, clean: Callable[[str], str] = str, indent: str = "") -> list[str]:
    """Paragraphs that read like prose, each on one line.

    Args:
        text: plain text whose paragraphs are separated by empty lines.
        clean: removes markup from one paragraph.
        indent: what body text starts with; deeper lines are examples and go.

    Returns:
        Paragraphs of some length that end like a sentence and are mostly letters.
    """
    blocks = (block for block in re.split(r"\n\s*\n", text) if _is_flush(block, indent))
    cleaned = (" ".join(clean(block).split()) for block in blocks)
    return [block for block in cleaned if _is_prose(block)]


def join(blocks: Iterable[str]) -> str:
    """One text of paragraphs with an empty line between them."""
    return "\n\n".join(blocks)


def clean_novel(block: str) -> str:
    """Drop `_emphasis_`."""
    return block.replace("_", "")


def clean_jargon(block: str) -> str:
    """Drop the braces of cross references."""
    return re.sub(r"[{}]", "", block)


def clean_rst(block: str) -> str:
    """Drop reStructuredText's roles and emphasis."""
    block = re.sub(r":[a-z:-]+:`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`", r"\1", block)
    block = re.sub(r"`([^`<]+?)(?:\s*<[^`]*>)?`_+", r"\1", block)
    return re.sub(r"``|`|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)", "", block)


def clean_pod(block: str) -> str:
    """Drop Perl's formatting codes, innermost first."""
    block = re.sub(r"[BCFIS]<<+\s+(.*?)\s+>>+", r"\1", block, flags=re.DOTALL)
    for _ in range(3):
        block = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], block)
        block = re.sub(r"X<[^<>]*>|Z<>", "", block)
        block = re.sub(r"[BCFIS]<([^<>]*)>", r"\1", block)
    return block.replace("E<lt>", "<").replace("E<gt>", ">")


def _is_flush(block: str, indent: str) -> bool:
    lines = [line for line in block.splitlines() if line.strip()]
    return bool(lines) and all(
        line.startswith(indent) and not line[len(indent) :].startswith((" ", "\t", ".. ", "=", ":"))
        for line in lines
    )


def _is_prose(block: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in block)
    return (
        len(block) >= _MIN_CHARS
        and letters > 0.85 * len(block)
        and bool(_SENTENCE_END.search(block))
    )
