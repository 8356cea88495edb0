"""Draws the pictures of how-it-works.md: python docs/pictures/draw.py"""

from __future__ import annotations

from pathlib import Path

WIDTH = 480
INK, FAINT, PAPER = "#24292f", "#8c959f", "#ffffff"
PAGE, RING, NEW, GONE = "#2f6fb0", "#e08a1e", "#2e8b57", "#c9ced6"
HEADS = ("#2f6fb0", "#8250b8")


class Picture:
    """Shapes on white paper, 480 wide so that letters stay readable on a phone."""

    def __init__(self, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif" '
            f'font-size="14" fill="{INK}">',
            f"<title>{title}</title>",
            f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, fill: str, line: str = PAPER) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
            f'stroke="{line}" stroke-width="1.5"/>'
        )

    def text(self, x: float, y: float, words: str, *, at: str = "start", fill: str = INK) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{at}" fill="{fill}">{words}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, line: str = INK) -> None:
        dx, dy = x2 - x1, y2 - y1
        size = (dx * dx + dy * dy) ** 0.5
        ux, uy = dx / size, dy / size
        left = f"{x2 - 8 * ux + 4 * uy:g},{y2 - 8 * uy - 4 * ux:g}"
        right = f"{x2 - 8 * ux - 4 * uy:g},{y2 - 8 * uy + 4 * ux:g}"
        self.parts.append(
            f'<path d="M{x1:g} {y1:g} L{x2 - 6 * ux:g} {y2 - 6 * uy:g}" stroke="{line}" '
            f'stroke-width="2" fill="none"/><polygon points="{x2:g},{y2:g} {left} {right}" '
            f'fill="{line}"/>'
        )

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def page(picture: Picture, x: float, y: float, used: int, fill: str) -> None:
    """A page of four slots, as many of them used."""
    for slot in range(4):
        picture.box(x + 14 * slot, y, 14, 18, fill if slot < used else "#eef1f4")
    picture.box(x, y, 56, 18, "none", INK)


def dual_cache() -> str:
    out = Picture(352, "Two KV heads with pages and a ring each, on one pool of pages")
    for head, counts in enumerate(((4, 4, 4, 2), (4, 1))):
        y = 30 + 92 * head
        out.text(14, y, f"KV head {head}")
        for n, used in enumerate(counts):
            page(out, 14 + 62 * n, y + 12, used, HEADS[head])
        for slot, admitted in enumerate((1, 0, 0, 1, 0, 1) if head == 0 else (0, 0, 1, 0, 0, 0)):
            out.box(312 + 24 * slot, y + 10, 22, 22, RING if admitted else "#f3d9b1")
        out.arrow(306, y + 21, 14 + 62 * len(counts) + 6, y + 21, NEW)
        out.arrow(323, y + 36, 323, y + 60, FAINT)
        out.text(334, y + 56, "not admitted: gone", fill="#57606a")
    out.text(312, 22, "ring: the last W tokens", fill="#8a5200")
    out.text(14, 232, "One pool of pages for all heads, layers and forks:")
    null, free = "#57606a", PAPER
    pages = [(null, 4), (HEADS[0], 4), (HEADS[0], 4), (HEADS[1], 4), (HEADS[0], 4), (free, 0)]
    pages += [(HEADS[1], 1), (free, 0), (HEADS[0], 2), (free, 0), (free, 0), (free, 0)]
    for n, (fill, used) in enumerate(pages):
        page(out, 14 + 62 * (n % 7), 246 + 26 * (n // 7), used, fill)
    for x, fill, words in ((14, HEADS[0], "head 0"), (100, HEADS[1], "head 1")):
        out.box(x, 318, 14, 14, fill)
        out.text(x + 20, 330, words)
    out.box(186, 318, 14, 14, null)
    out.text(206, 330, "null page")
    out.box(294, 318, 14, 14, "#eef1f4", FAINT)
    out.text(314, 330, "free, given back")
    return out.svg()


def visible() -> str:
    """Which tokens a query sees: a band and the admitted columns."""
    out = Picture(470, "Rows are queries, columns keys: a band of the window and admitted columns")
    admitted, tokens, window, size = {0, 1, 5, 6, 12, 17}, 24, 5, 15
    left, top = 92, 34
    out.text(left, 22, "key j, the oldest first")
    out.text(14, top + 40, "query i")
    for i in range(tokens):
        for j in range(tokens):
            fill = "#f3f5f7"
            if j <= i:
                near, kept = i - j < window, j in admitted
                fill = RING if near else PAGE if kept else GONE
            out.box(left + size * j, top + size * i, size, size, fill)
    for n, (fill, words) in enumerate(
        (
            (RING, "in the window, i - j &lt; W"),
            (PAGE, "admitted"),
            (GONE, "forgotten, or never stored"),
        )
    ):
        out.box(92, 404 + 20 * n, 14, 14, fill)
        out.text(114, 416 + 20 * n, words)
    return out.svg()


def phases() -> str:
    out = Picture(
        330, "Admission at every token, eviction at the prompt's end, selection when decoding"
    )
    columns = ((14, 140, "prompt"), (166, 142, "end_prompt"), (320, 146, "decode"))
    for x, w, name in columns:
        out.box(x, 14, w, 30, "#eef1f4", FAINT)
        out.text(x + w / 2, 34, name, at="middle")
    out.arrow(154, 29, 166, 29)
    out.arrow(308, 29, 320, 29)
    rows = (
        (60, NEW, "admission", "decides for each", None, "each new token"),
        (130, "#b0413e", "eviction", None, "drops stored tokens", "every 16 tokens"),
        (200, PAGE, "selection", None, None, "which pages to read"),
    )
    for y, fill, name, *cells in rows:
        for (x, w, _), words in zip(columns, cells, strict=True):
            out.box(x, y, w, 54, fill if words else "#f6f8fa", PAPER if words else "#e3e7eb")
            if words:
                out.text(x + w / 2, y + 23, name, at="middle", fill=PAPER)
                out.text(x + w / 2, y + 42, words, at="middle", fill=PAPER)
            else:
                out.text(x + w / 2, y + 32, "reads all" if name == "selection" and x < 100 else "-",
                         at="middle", fill=FAINT)  # fmt: skip
    for n, words in enumerate(
        (
            "admission: what is never stored",
            "eviction: what is given back",
            "selection: frees nothing",
        )
    ):
        out.text(14, 278 + 20 * n, words, fill="#57606a")
    return out.svg()


PICTURES = {"dual-cache.svg": dual_cache, "visible.svg": visible, "phases.svg": phases}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (Path(__file__).parent / name).write_text(draw(), encoding="utf-8")
