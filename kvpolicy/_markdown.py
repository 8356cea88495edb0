"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> list[str]:
    """Lines of a table; with `numbers`, all columns but the first are set to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(heads) - 1)]
    return [_line(cells) for cells in (heads, rule, *rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
