"""A picture of what a cache kept: the text by token, and every head by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..._extras import extra
from ..._pictures import ACCENT, INK, MUTED, PAPER, SCALE
from ...store import CacheState
from ..tasks.prompts import Example

LINE_CHARS, LINES = 104, 8
FONT = "DejaVu Sans Mono"


def kept(state: CacheState) -> Tensor:
    """Which tokens of the only sequence each head holds, bool `[L, Hkv, N]` on the host."""
    heads = state.spec.kv_heads
    held = torch.zeros(len(state.layers), heads, state.lengths[0], dtype=torch.bool)
    for layer in range(len(state.layers)):
        for head in range(heads):
            held[layer, head, state.kept(layer, 0, head).cpu()] = True
    return held


def answer_spans(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[tuple[int, int]]:
    """Where each question's answer stands in the context: `(first, after the last)` token."""
    ids = list(example.context_ids)
    spans = []
    for question in example.questions:
        size = len(question.answer_ids)
        starts = (i for i in range(len(ids)) if tuple(ids[i : i + size]) == question.answer_ids)
        first = next(starts, None)
        if first is not None:
            spans.append((first, first + size))
    return spans


def darkest(share: Tensor) -> float:
    """The share of heads from which on colours end: few tokens outside the window go beyond."""
    return max(float(share[share < 1].quantile(0.99)) if bool((share < 1).any()) else 1.0, 0.05)


def draw(
    path: Path,
    held: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    title: str,
    window: int = 0,
) -> None:
    """Saves the picture of `held` `[L, Hkv, N]` for the context of `example`.

    Above, the text around the first question's answer; a token is the darker, the more heads kept
    it. Below, all heads by position, answers and the local window of the last `window` tokens
    marked.
    """
    with extra("plots"):
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure

    colours = LinearSegmentedColormap.from_list("kept", SCALE)
    pieces = [str(tokenizer.decode([i])) for i in example.context_ids]
    spans = answer_spans(tokenizer, example)
    share = held.float().mean((0, 1))

    figure = Figure(figsize=(13, 10), facecolor=PAPER)
    figure.text(0.045, 0.955, title, fontsize=17, color=INK, weight="bold")
    heads = held.shape[0] * held.shape[1]
    figure.text(
        0.045,
        0.925,
        f"{held.shape[0]} layers x {held.shape[1]} KV heads = {heads} caches; they kept "
        f"{held.float().mean():.0%} of {held.shape[2]:,} tokens",
        fontsize=11.5,
        color=MUTED,
    )
    text = figure.add_axes((0.045, 0.595, 0.91, 0.28))
    _text(text, pieces, share, spans, colours)
    above = figure.add_axes((0.085, 0.505, 0.80, 0.055))
    _profile(above, share, spans, window)
    image = figure.add_axes((0.085, 0.065, 0.80, 0.435), sharex=above)
    _heads(image, held, spans, window)
    side = figure.add_axes((0.892, 0.065, 0.063, 0.435))
    _layers(side, held)
    figure.savefig(path, dpi=150, facecolor=PAPER)


def _text(
    axes: Any, pieces: Sequence[str], share: Tensor, spans: Sequence[tuple[int, int]], colours: Any
) -> None:
    """Lines of text from before the first answer on, one box a token."""
    with extra("plots"):
        from matplotlib.patches import Rectangle

    first, after = spans[0] if spans else (len(pieces) // 2, len(pieces) // 2)
    start, room = first, LINE_CHARS * LINES * 2 // 5
    while start > 0 and room > 0:
        start -= 1
        room -= len(pieces[start])
    most = darkest(share)
    inside = {i for begin, end in spans for i in range(begin, end)}
    size = 72 * 13 * 0.91 / LINE_CHARS / 0.602  # points; a character is 0.602 em wide
    row = column = 0
    for i in range(start, len(pieces)):
        piece = " ".join(pieces[i].splitlines()) if pieces[i].strip() else " "
        if column + len(piece) > LINE_CHARS:
            row, column = row + 1, 0
        if row == LINES:
            break
        level = min(float(share[i]) / most, 1.0)
        box = Rectangle((column, row), len(piece), 0.86, color=colours(level), linewidth=0)
        axes.add_patch(box)
        if i in inside:
            axes.plot((column, column + len(piece)), (row + 0.9,) * 2, color=ACCENT, linewidth=2.6)
        axes.text(
            column,
            row + 0.46,
            piece,
            family=FONT,
            fontsize=size,
            va="center",
            color="white" if level > 0.62 else INK,
        )
        column += len(piece)
    axes.set(xlim=(0, LINE_CHARS), ylim=(LINES, -0.05))
    axes.axis("off")
    for step in range(5):
        at = (LINE_CHARS - 27 + 3 * step, -0.66)
        axes.add_patch(Rectangle(at, 3, 0.34, color=colours(step / 4), clip_on=False))
    small = {"va": "center", "fontsize": 9.5, "color": MUTED}
    axes.text(LINE_CHARS - 28, -0.49, "kept by no head", ha="right", **small)
    axes.text(LINE_CHARS, -0.49, f"by {most:.0%} or more", ha="right", **small)
    if spans:
        axes.text(0, -0.49, "answers are underlined", **{**small, "color": ACCENT})
    else:
        axes.text(0, -0.49, f"the text from token {start} on", **small)


def _profile(axes: Any, share: Tensor, spans: Sequence[tuple[int, int]], window: int) -> None:
    axes.fill_between(range(len(share)), share, step="mid", color=SCALE[3], linewidth=0)
    axes.set(ylim=(0, 1), yticks=(0, 1), yticklabels=("0", "100 %"))
    _bare(axes)
    axes.tick_params(labelbottom=False)
    axes.set_ylabel("heads", fontsize=9.5, color=MUTED)
    if 0 < window < len(share):
        says = f"local window: the last {window} tokens \u2192 "
        at = len(share) - window - 0.5, 0.78
        box = {"facecolor": PAPER, "alpha": 0.8, "pad": 1, "linewidth": 0}
        axes.text(*at, says, ha="right", va="center", fontsize=9.5, color=INK, bbox=box)
    for begin, end in spans:
        axes.annotate(
            "",
            ((begin + end) / 2, 1.02),
            ((begin + end) / 2, 1.45),
            arrowprops={"arrowstyle": "-|>", "color": ACCENT, "linewidth": 1.2},
            annotation_clip=False,
        )


def _heads(axes: Any, held: Tensor, spans: Sequence[tuple[int, int]], window: int) -> None:
    with extra("plots"):
        from matplotlib.colors import ListedColormap

    layers, heads, tokens = held.shape
    axes.imshow(
        held.flatten(0, 1).numpy(),
        aspect="auto",
        interpolation="antialiased",
        interpolation_stage="rgba",
        cmap=ListedColormap([SCALE[0], SCALE[4]]),
        extent=(-0.5, tokens - 0.5, layers, 0),
    )
    for begin, end in spans:
        axes.axvspan(begin - 0.5, end - 0.5, color=ACCENT, alpha=0.16, linewidth=0)
    if 0 < window < tokens:
        axes.axvline(tokens - window - 0.5, color=INK, linewidth=1, linestyle=":")
    says = "position in the document; dark: kept" + ("; red: answers" if spans else "")
    axes.set_xlabel(says, fontsize=10.5, color=MUTED)
    axes.set_ylabel(f"layer, {heads} KV heads each", fontsize=10.5, color=MUTED)
    axes.set_yticks([n + 0.5 for n in range(0, layers, 5)], [str(n) for n in range(0, layers, 5)])
    axes.set_xlim(-0.5, tokens - 0.5)
    _bare(axes)


def _layers(axes: Any, held: Tensor) -> None:
    by_head = held.float().mean(2).flatten()
    layers, heads = held.shape[:2]
    at = [(n + 0.5) / heads for n in range(layers * heads)]
    axes.barh(at, by_head.numpy(), height=0.8 / heads, color=SCALE[3], linewidth=0)
    axes.set(ylim=(layers, 0), xlim=(0, 1), yticks=(), xticks=(0, 1), xticklabels=("0", "100 %"))
    axes.set_xlabel("kept", fontsize=9.5, color=MUTED)
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_facecolor(PAPER)
    axes.tick_params(colors=MUTED, labelsize=9, length=2)
    for side in axes.spines.values():
        side.set_visible(False)
