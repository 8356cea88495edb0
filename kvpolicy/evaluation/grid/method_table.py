"""All methods in one table a size: rows of docs/policies.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from ..._markdown import table
from ..sessions.estimates import estimate
from .records import Result
from .variants import SEEN

Column = tuple[str, int]


def method_tables(results: Sequence[Result], left_out: Mapping[str, str]) -> list[str]:
    """Lines of Markdown: accuracy of answer tokens by task and length, best means first.

    Methods that lack a cell come after those that lack none. Full attention and what acts on
    prompts alone stand in every table.
    """
    done = [x for x in results if x.measured is not None and "accuracy" in x.measured.scores]
    keeps = list(dict.fromkeys(x.keep for x in done if x.keep < 1))
    columns = list(dict.fromkeys((x.task, x.length) for x in done))
    lines = []
    for keep in keeps:
        for seen in (False, True):
            own = [x for x in done if x.keep == keep and (SEEN in x.family) == seen]
            if own:
                also = [x for x in done if x.keep == 1]
                when = "the question seen" if seen else "the question unseen"
                lines += [f"## Methods at {keep:.3g} of the cache, {when}", ""]
                lines += [*_table([*also, *own], columns), ""]
    errors = [estimate(x.measured.scores["accuracy"]).standard_error for x in done if x.measured]
    most = max((x for x in errors if not math.isnan(x)), default=math.nan)
    if lines and not math.isnan(most):
        lines += [f"Means over contexts; standard errors are at most {most:.3f}.", ""]
    if lines and left_out:
        why = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
        lines += [f"Left out: {why}.", ""]
    return lines


def _table(results: Sequence[Result], columns: Sequence[Column]) -> list[str]:
    rows: dict[str, dict[Column, Result]] = {}
    for x in results:
        rows.setdefault(x.family.replace(SEEN, ""), {})[x.task, x.length] = x

    def scores(row: Mapping[Column, Result]) -> list[float]:
        found = (x.measured for x in row.values())
        return [statistics.fmean(x.scores["accuracy"]) for x in found if x is not None]

    def held(row: Mapping[Column, Result]) -> str:
        found = [x.measured.footprint.held for x in row.values() if x.measured is not None]
        return f"{statistics.fmean(found):.0%}"

    order = sorted(rows, key=lambda name: (-len(rows[name]), -statistics.fmean(scores(rows[name]))))
    cells = [
        [name, held(rows[name]), *(_cell(rows[name].get(column)) for column in columns)]
        for name in order
    ]
    names = ["method", "cache", *(f"{task}, {length}" for task, length in columns)]
    return table(names, cells, numbers=True)


def _cell(found: Result | None) -> str:
    if found is None or found.measured is None:
        return ""
    return f"{statistics.fmean(found.measured.scores['accuracy']):.2f}".removeprefix("0")
