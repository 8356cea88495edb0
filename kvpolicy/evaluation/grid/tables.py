"""Results as Markdown: what they were made from, the claims, and a table a task and length."""

from __future__ import annotations

from collections.abc import Sequence

from ..._markdown import table
from ..sessions.estimates import ratio, said, shown
from .claims import claims
from .method_table import method_tables
from .records import Measured, Result
from .results import Record
from .variants import FULL

#: The scores that are set in relation to full attention's.
COMPARED = ("accuracy", "loss", "hit_loss")


def summary(record: Record, results: Sequence[Result], title: str) -> str:
    """The text of results.md."""
    lines = [f"# {title}", "", *record_lines(record), *claims(results)]
    left_out = record["settings"].get("left_out")
    if left_out is not None:
        lines += method_tables(results, left_out)
    lines += [*tables(results), _NOTE, ""]
    return "\n".join(lines)


def tables(results: Sequence[Result]) -> list[str]:
    """Lines of Markdown, one table a task and length."""
    out = []
    for task, length in dict.fromkeys((x.task, x.length) for x in results):
        here = [x for x in results if (x.task, x.length) == (task, length)]
        done = {x.variant: x.measured for x in here if x.measured is not None}
        scores = list(dict.fromkeys(score for found in done.values() for score in found.scores))
        names = ["composition", "cache", "read", "MB"]
        names += [score.replace("_", " ") for score in scores]
        names += [f"{x.replace('_', ' ')} / full" for x in scores if x in COMPARED] + ["n"]
        rows = []
        for x in here:
            cells = [x.reason] if x.measured is None else _cells(x.measured, scores, done.get(FULL))
            rows.append([x.variant, *cells, *[""] * (len(names) - 1 - len(cells))])
        out += [f"## {task}, {length} tokens", "", *table(names, rows, numbers=True), ""]
    return out


def _cells(found: Measured, scores: Sequence[str], full: Measured | None) -> list[str]:
    size, base = found.footprint, {} if full is None else full.scores
    compared = [score for score in scores if score in COMPARED]
    return [
        f"{size.held:.1%}",
        f"{size.read:.1%}",
        f"{size.bytes / 1e6:.2f}",
        *(shown(found.scores.get(score, ())) for score in scores),
        *(said(ratio(found.scores.get(score, ()), base.get(score, ()))) for score in compared),
        str(len(found.scores[scores[0]])),
    ]


def record_lines(record: Record) -> list[str]:
    """What the results were made from and with."""
    pairs = [("", record["settings"]), *(("made with ", made) for made in record["made_with"])]
    lines = (
        what + ", ".join(f"{name} {x[name]}" for name in x if name != "left_out")
        for what, x in pairs
    )
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
