"""The page of a kept map: a text coloured by the heads that hold each token."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from string import Template

from ..._pictures import SCALE


def page(
    *,
    title: str,
    pieces: Sequence[str],
    share: Sequence[float],
    most: float,
    says: Sequence[str],
    held: Sequence[str],
    fraction: float,
    shape: tuple[int, int],
    window: int,
) -> str:
    """One page without further files.

    Args:
        title: heading of the page.
        pieces: the text of each token.
        share: the part of all heads that hold it.
        most: the share from which on all tokens have the darkest colour.
        says: one line on each token.
        held: heads of each token as 0 and 1, layer after layer.
        fraction: part of all tokens held, over all heads.
        shape: layers, and KV heads of a layer.
        window: the last tokens, which all heads hold in their local window.
    """
    layers, heads = shape
    spans = []
    for i, piece in enumerate(pieces):
        level = min(share[i] / most, 1.0)
        if i == len(pieces) - window:
            spans.append(f"<em>local window, {window} tokens &#9656;</em>")
        spans.append(
            f'<span data-i="{i}" style="background:{colour(level)}'
            f'{";color:#fff" if level > 0.62 else ""}" title="{html.escape(says[i])}">'
            f"{html.escape(piece)}</span>"
        )
    return _PAGE.substitute(
        title=html.escape(title),
        says=f"{layers} layers x {heads} KV heads hold {fraction:.1%} of {len(pieces):,} tokens",
        most=f"{most:.0%}",
        text="".join(spans),
        scale=", ".join(SCALE),
        held=json.dumps(list(held)),
        layers=layers,
        heads=heads,
    )


def colour(level: float) -> str:
    """The scale's colour at `level` in [0, 1], between its steps."""
    at = level * (len(SCALE) - 1)
    low = min(int(at), len(SCALE) - 2)
    ends = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in SCALE[low : low + 2]]
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


# Beside the text where there is room, else below it.
_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", monospace; color: #1d2733;
  background: #fbfaf7; max-width: 100ch; margin: 2em 20em 4em 2em }
h1 { font: bold 22px sans-serif } p, aside { font: 13px/1.5 sans-serif; color: #6b7683 }
main { white-space: pre-wrap; overflow-wrap: anywhere }
main span { border-radius: 2px; cursor: default }
main span:hover, main span.at { outline: 2px solid #c8452d }
main em { font: 12px sans-serif; color: #c8452d; border-left: 2px solid #c8452d;
  padding: 0 .4em; white-space: nowrap }
aside { position: fixed; right: 2em; top: 2em; width: 15em }
table { border-spacing: 2px }
i { display: inline-block; width: 9em; height: .8em; background: linear-gradient(90deg, $scale) }
td { width: 16px; height: 9px; padding: 0; background: #f3f0e8 } td.on { background: #0f4c5c }
th { font: 10px sans-serif; text-align: right; padding-right: 6px }
@media (max-width: 800px) {
  body { font-size: 14px; margin: 1em 1em 17em }
  aside { left: 0; right: 0; top: auto; bottom: 0; width: auto; max-height: 15em;
    overflow: auto; padding: .6em 1em; background: #fff; border-top: 1px solid #cfe1df }
  table { border-spacing: 1px } td { width: 26px; height: 4px } th { display: none }
}
</style></head>
<body>
<h1>$title</h1>
<p>$says. <i></i> from kept by no head to kept by $most of the heads or more.</p>
<aside><div id="what">Point at a token: its heads, one row a layer.</div><table id="grid"></table>
</aside>
<main>$text</main>
<script>
const held = $held, layers = $layers, heads = $heads;
let last = null;
function show(event) {
  const at = event.target.dataset.i;
  if (at === undefined) return;
  if (last) last.className = "";
  last = event.target;
  last.className = "at";
  document.getElementById("what").textContent = event.target.title;
  const grid = document.getElementById("grid");
  grid.replaceChildren();
  for (let layer = 0; layer < layers; layer++) {
    const row = grid.insertRow();
    const name = document.createElement("th");
    name.textContent = layer;
    row.append(name);
    for (let head = 0; head < heads; head++)
      if (held[at][layer * heads + head] === "1") row.insertCell().className = "on";
      else row.insertCell();
  }
}
for (const kind of ["mouseover", "click"])
  document.querySelector("main").addEventListener(kind, show);
</script>
</body>
</html>
""")
