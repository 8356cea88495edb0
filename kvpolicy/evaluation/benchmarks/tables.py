"""A benchmark's results as Markdown: a row a composition, a table a task, and means over tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import attrs

from ..._markdown import table
from ..grid.records import Measured, Result
from ..grid.results import Record
from ..grid.tables import record_lines
from ..grid.variants import FULL
from ..sessions.estimates import Estimate, estimate, ratio, said

LEAST = 0.5  # of full attention's score, from which a ratio counts


@attrs.frozen(kw_only=True)
class Mean:
    """Means of a composition over tasks at one length, each task counting alike.

    `part` is the mean of scores over full attention's, of the tasks that count.
    """

    variant: str
    family: str
    length: int
    score: Estimate
    part: Estimate
    counted: int
    tasks: int
    bytes: float
    held: float
    kv_footprint: float
    first_token: float


def counts(full: Measured | None) -> bool:
    """Whether full attention scores so much on a task that ratios to it mean something."""
    return full is not None and statistics.fmean(full.scores["score"]) >= LEAST


def means(results: Sequence[Result], length: int) -> list[Mean]:
    """Over the tasks that a composition and full attention were both measured on."""
    here = [x for x in results if x.length == length and x.measured is not None]
    full = {x.task: x.measured for x in here if x.variant == FULL and x.measured is not None}
    found = []
    for name in dict.fromkeys(x.variant for x in here):
        rows = [x for x in here if x.variant == name]
        done = [x.measured for x in rows if x.measured is not None]
        parts = [_part(x, full) for x in rows if counts(full.get(x.task))]
        found.append(
            Mean(
                variant=name,
                family=rows[0].family,
                length=length,
                score=_mean([estimate(x.scores["score"]) for x in done]),
                part=_mean(parts),
                counted=len(parts),
                tasks=len(rows),
                bytes=statistics.fmean(x.footprint.bytes for x in done),
                held=statistics.fmean(x.footprint.held for x in done),
                kv_footprint=statistics.fmean(x.kv_footprint or math.nan for x in done),
                first_token=statistics.fmean(x.first_token or math.nan for x in done),
            )
        )
    return found


def complete(rows: Sequence[Mean]) -> list[Mean]:
    """Compositions that were measured on as many tasks as any; means of fewer do not compare."""
    most = max((x.tasks for x in rows), default=0)
    return [x for x in rows if x.tasks == most]


def summary(record: Record, results: Sequence[Result], title: str) -> str:
    """The text of results.md."""
    lines = [f"# {title}", "", *record_lines(record)]
    for length in dict.fromkeys(x.length for x in results):
        tasks = list(dict.fromkeys(x.task for x in results if x.length == length))
        if len(tasks) > 1:
            found = means(results, length)
            whole = complete(found)
            rows = [_mean_row(x) for x in whole]
            heads = ["composition", "score", "/ full", "tasks counted", *_SIZES]
            lines += [f"## Mean over tasks, {length} tokens", ""]
            lines += [*table(heads, rows, numbers=True), ""]
            if part := [f"{x.variant} ({x.tasks})" for x in found if x not in whole]:
                lines += [f"Measured on fewer tasks: {', '.join(part)}.", ""]
        for task in tasks:
            here = [x for x in results if (x.task, x.length) == (task, length)]
            lines += [f"## {task}, {length} tokens", "", *_task(here), ""]
    return "\n".join([*lines, _NOTE, ""])


_SIZES = ["MB", "held", "KV footprint", "first token, s"]


def _task(here: Sequence[Result]) -> list[str]:
    full = next((x.measured for x in here if x.variant == FULL), None)
    heads = ["composition", "score", "/ full", *_SIZES, "contexts", "questions"]
    rows = []
    for x in here:
        done = x.measured
        if done is None:
            rows.append([x.variant, x.reason, *[""] * (len(heads) - 2)])
            continue
        score = done.scores["score"]
        part = said(ratio(score, full.scores["score"])) if full is not None else ""
        part = f"{part}{'' if counts(full) or not part else ', not counted'}"
        size = (done.footprint.bytes, done.footprint.held, done.kv_footprint, done.first_token)
        rows.append([x.variant, said(estimate(score)), part, *_sizes(*size), str(len(score)),
                     str(done.questions)])  # fmt: skip
    return table(heads, rows, numbers=True)


def _mean_row(x: Mean) -> list[str]:
    sizes = _sizes(x.bytes, x.held, x.kv_footprint, x.first_token)
    return [x.variant, said(x.score), said(x.part), f"{x.counted} of {x.tasks}", *sizes]


def _sizes(taken: float, held: float, footprint: float | None, first: float | None) -> list[str]:
    return [
        f"{taken / 1e6:.2f}",
        f"{held:.1%}",
        "" if footprint is None else f"{footprint:.1%}",
        "" if first is None else f"{first:.3f}",
    ]


def _part(result: Result, full: Mapping[str, Measured]) -> Estimate:
    assert result.measured is not None
    return ratio(result.measured.scores["score"], full[result.task].scores["score"])


def _mean(found: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    if not found:
        return Estimate(mean=math.nan, standard_error=math.nan)
    error = math.sqrt(sum(x.standard_error**2 for x in found)) / len(found)
    return Estimate(mean=statistics.fmean(x.mean for x in found), standard_error=error)


_NOTE = (
    "Score: the benchmark's own, 0 to 1, mean over contexts ± its standard error. / full: the "
    "quotient of means, its error by leaving one context out; it counts where full attention "
    f"scores {LEAST:.2g} or more, other cells are shown and left out of the mean of quotients. MB: "
    "all bytes of the cache of one context once it is read, measured; held: tokens that a head "
    "holds then, window included, of all tokens; KV footprint: entries stored times the steps that "
    "they stay, as a part of full attention's, questions and answers included. First token: from "
    "the start of a context alone to the first token of an answer, of one context, once. A gate's "
    "name in brackets: made to take as many bytes of keys and values as that gate on the same "
    "contexts. x% removed: of the context's tokens, as kvpress counts. Evictions see the context "
    "alone, or with the question where the name says so; the two kinds do not compare. All others "
    "answer alike either way."
)
