"""What all pictures share: one colour and mark a method, and how axes and legends look."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from ._extras import extra

INK, MUTED, PAPER, ACCENT = "#1d2733", "#6b7683", "#fbfaf7", "#c8452d"
#: From "kept by no head" to "by most".
SCALE = ("#f3f0e8", "#cfe1df", "#7fb8b8", "#2f8089", "#0f4c5c")
NEUTRAL = "#9aa7b4"  # what is no method: a kernel, a front
DPI = 110


@attrs.frozen
class Look:
    """How a method is drawn; those that often coincide have marks that do not cover each other."""

    colour: str
    marker: str = "o"
    hollow: bool = False

    def line(self, **other: Any) -> dict[str, Any]:
        """Arguments of `plot` and `errorbar`."""
        found = {"color": self.colour, "marker": self.marker, "markersize": 4.5}
        if self.hollow:
            found |= {"markerfacecolor": "none", "markersize": 8, "markeredgewidth": 1.5}
        return found | other


_METHODS = {
    "full": Look(INK),
    "write gate": Look(ACCENT),
    "DuoAttention": Look("#8a5fa8", "^"),
    "local": Look(MUTED, "v"),
    "random": Look("#b9a46b", "x"),
    "SnapKV": Look("#2f8089", "D"),
    "Quest": Look("#5b8c3a", "P"),
    "gate + Quest": Look("#3a6fc4", "s", hollow=True),
    "gate + SnapKV": Look("#e08a2c", "D", hollow=True),
    "Quest + SnapKV": Look("#a3b52f", "P", hollow=True),
    "gate + Quest + SnapKV": Look("#7a3b2e", "o", hollow=True),
}
_ALIASES = {"dense": "full", "gate": "write gate", "no eviction": "write gate"}
# Of methods that are not the library's.
_OTHERS = (
    Look("#c05a9b", "p"), Look("#4aa3c7", "h"), Look("#6a5acd", "*"), Look("#8f6b3f", "X"),
    Look("#d4b400", "<"), Look("#2b5d34", ">"),
)  # fmt: skip


def looks(names: Iterable[str]) -> dict[str, Look]:
    """How each method is drawn; the library's own look the same in every picture.

    What follows a comma and "at a cap" are ways to run the same method.
    """
    found: dict[str, Look] = {}
    others = 0
    for name in dict.fromkeys(names):
        method = name.partition(",")[0].removesuffix(" at a cap")
        look = _METHODS.get(_ALIASES.get(method, method))
        if look is None:
            look = _OTHERS[others % len(_OTHERS)]
            others += 1
        found[name] = look
    return found


def axes_of(figure: Any, rows: int, columns: int, **options: Any) -> Any:
    """Panels `[rows, columns]` of a figure, on paper, without frames."""
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        bare(axes)
    return panels


def bare(axes: Any) -> None:
    """Leaves two faint sides of the frame and a faint grid behind the data."""
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    axes.grid(color=MUTED, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)


def new_figure(width: float, height: float, title: str, note: str = "") -> Any:
    """A figure of so many inches with a title and smaller lines below it."""
    with extra("plots"):
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
    figure = Figure(figsize=(width, height), facecolor=PAPER, layout=layout)
    lines = title.count("\n") + 1
    text = figure.suptitle(title, color=INK, fontsize=13 if width > 6 else 11.5, weight="bold")
    if note:
        text.set_text(title + "\n" * (note.count("\n") + lines))
        top = 1 - (0.26 + 0.16 * lines) / height
        figure.text(0.5, top, note, ha="center", va="top", color=MUTED, fontsize=9.5)
    return figure


def curve(
    axes: Any,
    at: Sequence[float],
    values: Sequence[float],
    below: Sequence[float],
    above: Sequence[float],
    look: Look,
    label: str,
    *,
    dashed: bool = False,
) -> None:
    """Points joined by a line, with a bar from `below` to `above` each where there is an error."""
    axes.plot(
        at, values, label=label, **look.line(linestyle="--" if dashed else "-", linewidth=1.6)
    )
    bars = [x for x in zip(at, values, below, above, strict=True) if x[2] > 0 or x[3] > 0]
    if bars:
        x, y, low, high = zip(*bars, strict=True)
        axes.errorbar(x, y, yerr=(low, high), fmt="none", ecolor=look.colour, capsize=3)


def legend(figure: Any, panels: Iterable[Any], last: str = "", inside: Any = None) -> None:
    """One legend for all panels, below them and so never on data; the label `last` ends it.

    `inside` is an empty panel that takes it instead.
    """
    handles: dict[str, Any] = {}
    for axes in panels:
        found = zip(*axes.get_legend_handles_labels(), strict=True)
        handles |= {name: handle for handle, name in found if name not in handles}
    if last in handles:
        handles[last] = handles.pop(last)
    if inside is not None:
        inside.set_axis_off()
        inside.legend(
            list(handles.values()), list(handles), loc="center", frameon=False, fontsize=9.5,
            labelcolor=INK, labelspacing=0.9,
        )  # fmt: skip
    elif handles:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", frameon=False,
            ncols=min(max(int(figure.get_figwidth() / 3), 1), len(handles)), fontsize=9.5,
            labelcolor=INK,
        )  # fmt: skip


def percent(axis: Any) -> None:
    """Ticks at whole percents."""
    with extra("plots"):
        from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
