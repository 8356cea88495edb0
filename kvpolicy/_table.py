"""Tables that a person reads: as text for terminals, as HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence

import attrs

Row = Sequence[str]


@attrs.frozen(kw_only=True)
class Section:
    """Rows under heads; a row may be shorter. `wide`: cells are words, set to the left."""

    heads: Row
    rows: Sequence[Row]
    wide: bool = False


@attrs.frozen(kw_only=True)
class Table:
    """Sections of cells under one title. The first column holds names, the others numbers."""

    title: str
    sections: Sequence[Section]

    def text(self) -> str:
        """Lines of text, columns in line over all sections."""
        numbers = [x for x in self.sections if not x.wide]
        rows = [row for section in numbers for row in (section.heads, *section.rows)]
        names = [row[0] for x in self.sections for row in (x.heads, *x.rows)]
        first = max(map(len, names), default=0)
        count = max(map(len, rows), default=1)
        widths = [max(len(row[n]) for row in rows if len(row) > n) for n in range(1, count)]
        lines = [self.title]
        for section in self.sections:
            lines.append("")
            for row in (section.heads, *section.rows):
                cells = row[1:]
                if not section.wide:
                    cells = [cell.rjust(w) for cell, w in zip(cells, widths, strict=False)]
                lines.append("  ".join([row[0].ljust(first), *cells]).rstrip())
        return "\n".join(lines)

    def html(self) -> str:
        """One `<table>` without scripts or styles of its own but the numbers' alignment."""
        width = max((len(x.heads) for x in self.sections), default=1)
        body = []
        for section in self.sections:
            body.append(_html(section.heads, "th", width, section.wide))
            body += [_html(row, "td", width, section.wide) for row in section.rows]
        title = html.escape(self.title)
        return f"<table><caption>{title}</caption><tbody>{''.join(body)}</tbody></table>"


def _html(row: Row, tag: str, width: int, wide: bool) -> str:
    cells = [*row, *[""] * (len(row) and width - len(row))] if not wide else row
    out = []
    for n, cell in enumerate(cells):
        last = wide and n == len(cells) - 1
        span = f' colspan="{width - n}"' if last and width - n > 1 else ""
        side = "left" if wide or n == 0 else "right"
        out.append(f'<{tag}{span} style="text-align:{side}">{html.escape(cell)}</{tag}>')
    return f"<tr>{''.join(out)}</tr>"


def size(count: int) -> str:
    """Bytes in a unit of 1024 that leaves few digits."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:,.0f} {units[0]}" if units[0] == "B" else f"{value:,.2f} {units[0]}"


def part(value: float, of: float) -> str:
    """A part of a whole in percent; "" where there is no whole."""
    return f"{value / of:.1%}" if of else ""


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers, neighbours joined: "0-3, 7"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)
