"""Why was this token kept? A text coloured by the heads that hold each token."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...adapters.hf import KVPolicyCache
from ...store import CacheState
from ..sessions.pipeline import PipelineSession
from ..tasks.prompts import Example
from . import kept_map as picture


@attrs.frozen(kw_only=True, eq=False)
class KeptMap:
    """Which tokens each head of a cache holds.

    `held` bool `[L, Hkv, N]` for the N tokens `ids`; the last `windows[layer]` tokens are in that
    layer's local window, so that all of its heads hold them whatever the policies say.
    """

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    held: Tensor
    windows: tuple[int, ...]

    @property
    def heads(self) -> Tensor:
        """How many heads of all layers hold each token, `[N]`."""
        return self.held.sum((0, 1))

    @property
    def fraction(self) -> float:
        """Part of all tokens held, over all heads."""
        return self.held.double().mean().item()

    def why(self, token: int) -> str:
        """One line on one token.

        Raises:
            IndexError: there is no such token.
        """
        if not 0 <= token < len(self.ids):
            raise IndexError(f"token: wanted 0 to {len(self.ids) - 1}, got {token}")
        layers, heads, tokens = self.held.shape
        near = sum(heads for window in self.windows if tokens - token <= window)
        far = int(self.heads[token]) - near
        said = [f"kept by {near + far} of {layers * heads} heads"]
        if near:
            said.append(f"{near} for the local window")
        if far:
            said.append(f"{far} in pages")
        return f"{token}: " + ", ".join(said)

    def html(self, path: Path | str, *, title: str = "What the cache kept") -> None:
        """Saves one page without further files: hover over a token to see its heads."""
        layers, heads, tokens = self.held.shape
        share = self.heads / (layers * heads)
        spans = [
            f'<span data-i="{i}" style="background:{_colour(float(share[i]))}'
            f'{";color:#fff" if share[i] > 0.62 else ""}" title="{html.escape(self.why(i))}">'
            f"{html.escape(piece)}</span>"
            for i, piece in enumerate(self.pieces)
        ]
        held = f"{self.fraction:.1%} of {tokens:,} tokens"
        page = _PAGE.substitute(
            title=html.escape(title),
            says=f"{layers} layers x {heads} KV heads hold {held}",
            text="".join(spans),
            scale=", ".join(picture.SCALE),
            held=json.dumps(_rows(self.held)),
            layers=layers,
            heads=heads,
        )
        Path(path).write_text(page, encoding="utf-8")

    def png(
        self,
        path: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        title: str = "What the cache kept",
    ) -> None:
        """Saves a picture: some of the text by token, and all heads by position."""
        example = Example(context_ids=self.ids, questions=())
        picture.draw(Path(path), self.held, tokenizer, example, title=title)


def kept_map(
    cache: KVPolicyCache | PipelineSession | CacheState,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int] | Tensor,
) -> KeptMap:
    """Reads what a cache of one sequence holds of `ids` `[N]`, the tokens that went through it.

    Raises:
        ValueError: the cache is empty, holds several sequences, or saw another number of tokens.
    """
    state = cache if isinstance(cache, CacheState) else cache.state
    if state is None or state.batch != 1:
        found = "none" if state is None else state.batch
        raise ValueError(f"cache: wanted one sequence, got {found}")
    tokens = tuple(torch.as_tensor(ids).tolist())
    if len(tokens) != state.lengths[0]:
        raise ValueError(f"ids: the cache saw {state.lengths[0]} tokens, got {len(tokens)} ids")
    return KeptMap(
        ids=tokens,
        pieces=tuple(str(tokenizer.decode([token])) for token in tokens),
        held=picture.kept(state),
        windows=tuple(layer.window for layer in state.layers),
    )


def _rows(held: Tensor) -> list[str]:
    """Heads of each token as one string of 0 and 1, layer after layer."""
    bits = held.flatten(0, 1).T.int()
    return ["".join(map(str, row)) for row in bits.tolist()]


def _colour(share: float) -> str:
    """The scale's colour at `share` in [0, 1], between its steps."""
    at = share * (len(picture.SCALE) - 1)
    low = min(int(at), len(picture.SCALE) - 2)
    ends = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in picture.SCALE[low : low + 2]]
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>$title</title>
<style>
body { font: 15px/1.9 ui-monospace, "DejaVu Sans Mono", monospace; color: #1d2733;
  background: #fbfaf7; max-width: 100ch; margin: 2em 20em 4em 2em }
h1 { font: bold 22px sans-serif } p, aside { font: 13px/1.5 sans-serif; color: #6b7683 }
main { white-space: pre-wrap; overflow-wrap: anywhere }
main span { border-radius: 2px; cursor: default } main span:hover { outline: 2px solid #c8452d }
aside { position: fixed; right: 2em; top: 2em; width: 15em }
i { display: inline-block; width: 9em; height: .8em; background: linear-gradient(90deg, $scale) }
td { width: 16px; height: 9px; background: #f3f0e8 } td.on { background: #0f4c5c }
th { font: 10px sans-serif; text-align: right; padding-right: 6px }
</style>
<h1>$title</h1>
<p>$says. <i></i> from no head to all.</p>
<aside><div id="what">Hover over a token: its heads, one row a layer.</div><table id="grid"></table>
</aside>
<main>$text</main>
<script>
const held = $held, layers = $layers, heads = $heads;
document.querySelector("main").addEventListener("mouseover", event => {
  const at = event.target.dataset.i;
  if (at === undefined) return;
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
});
</script>
</html>
""")
