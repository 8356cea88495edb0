"""A plot of a benchmark: scores over the bytes that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import attrs

from ..._pictures import DPI, INK, axes_of, curve, legend, looks, new_figure
from ..grid.records import Result
from ..grid.variants import FULL, SEEN
from .tables import complete, means

_NOTE = "Mean over tasks and its standard error; dotted: full attention. Dashed: question seen."


def plot(folder: Path, results: Sequence[Result], name: str) -> None:
    """Saves score-over-bytes.png: a panel a length, a line a family."""
    measured = [x for x in results if x.measured is not None]
    lengths = sorted({x.length for x in measured})
    if not lengths:
        return
    found = {length: complete(means(measured, length)) for length in lengths}
    named = looks(dict.fromkeys(x.family for rows in found.values() for x in rows))
    size = max(4.6 * len(lengths), 7.5), 6.4
    figure = new_figure(*size, f"{name}: what is answered from how many bytes", _NOTE)
    panels = axes_of(figure, 1, len(lengths), sharey="row")
    for length, axes in zip(lengths, panels[0], strict=True):
        for family in dict.fromkeys(x.family for x in found[length]):
            of = sorted((x for x in found[length] if x.family == family), key=lambda x: x.bytes)
            if family == FULL:
                axes.axhline(of[0].score.mean, color=INK, linestyle=":", label=family)
                continue
            seen = SEEN in family
            look = attrs.evolve(named[family], marker="s") if seen else named[family]
            errors = [_number(x.score.standard_error) for x in of]
            at = [x.bytes / 1e6 for x in of]
            curve(axes, at, [x.score.mean for x in of], errors, errors, look, family, dashed=seen)
        axes.set_title(f"{length} tokens", color=INK, fontsize=11)
        axes.set_xlabel("MB of a context's cache, measured", color=INK, fontsize=9.5)
        axes.set_xlim(0, 1.05 * max(x.bytes for x in found[length]) / 1e6)  # full attention's too
    panels[0, 0].set_ylabel("score", color=INK, fontsize=9.5)
    panels[0, 0].set_ylim(0, 1.03)
    legend(figure, panels.flat, last=FULL)
    figure.savefig(folder / "score-over-bytes.png", dpi=DPI)


def _number(error: float) -> float:
    return 0.0 if math.isnan(error) else error
