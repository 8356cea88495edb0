"""Results as Markdown: what they were made from, the claims, and a table a task and length."""

from __future__ import annotations

from collections.abc import Sequence

from ..._markdown import table
from ..sessions.estimates import ratio, said, shown
from .claims import claims
from .results import Row
from .variants import FULL, LOSS


def summary(record: Row, rows: Sequence[Row], title: str) -> str:
    """The text of results.md."""
    lines = [f"# {title}", "", *_record(record), *claims(rows), *tables(rows), _NOTE, ""]
    return "\n".join(lines)


def tables(rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown, one table a task and length."""
    out = []
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        here = [row for row in rows if (row["task"], row["length"]) == (task, length)]
        full = next((row for row in here if row["variant"] == FULL and "skipped" not in row), {})
        names = ["composition", "cache", "read", "MB"]
        names += [score.replace("_", " ") for score in _scores(task)]
        names += [f"{score.replace('_', ' ')} / full" for score in compared(task)] + ["n"]
        out += [f"## {task}, {length} tokens", ""]
        out += table(names, [_cells(row, full, len(names)) for row in here], numbers=True)
        out.append("")
    return out


def compared(task: str) -> tuple[str, ...]:
    """The scores that are set in relation to full attention's."""
    return ("loss", "hit_loss") if task == LOSS else ("accuracy",)


def _cells(row: Row, full: Row, width: int) -> list[str]:
    """A row of a table `width` wide; `full` is full attention's."""
    if "skipped" in row:
        return [row["variant"], row["skipped"], *[""] * (width - 2)]
    scores = _scores(row["task"])
    return [
        row["variant"],
        f"{row['held_tokens'] / row['seen_tokens']:.1%}",
        f"{row['read_tokens'] / row['seen_tokens']:.1%}",
        f"{row['bytes'] / 1e6:.2f}",
        *(shown(row[score]) for score in scores),
        *(said(ratio(row[score], full.get(score, []))) for score in compared(row["task"])),
        str(len(row[scores[0]])),
    ]


def _scores(task: str) -> tuple[str, ...]:
    return ("loss", "hit_loss") if task == LOSS else ("accuracy", "exact", "log_likelihood")


def _record(record: Row) -> list[str]:
    """What the results were made from and with."""
    pairs = [("", record["settings"]), *(("made with ", made) for made in record["made_with"])]
    lines = (what + ", ".join(f"{name} {x[name]}" for name in x) for what, x in pairs)
    return [*(f"{text}  " for text in lines), ""]


_NOTE = (
    "Cache: tokens held per head, local window included, of all tokens seen; read: those that the "
    "last token read. A gate's name in brackets: made to take as many bytes of keys and values as "
    "that gate on the same prompts. At a fraction: the selection reads, or the eviction leaves "
    "when the prompt ends, that part of the context's tokens per head. MB: all bytes of a "
    "sequence's cache. Means over n contexts ± their standard errors; / full: the quotient of "
    "means, its error by leaving one context out. SnapKV evicts when the prompt ends: before the "
    "question, or after it where the name says that it has seen it; numbers of the two kinds do "
    "not compare. All others answer alike either way."
)
