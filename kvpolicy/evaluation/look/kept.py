"""Why was this token kept? A text coloured by the heads that hold each token."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...adapters.hf import KVPolicyCache
from ...store import CacheState
from ..sessions.pipeline import PipelineSession
from ..tasks.prompts import Example
from . import kept_map as picture
from .kept_page import page


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

    @property
    def window(self) -> int:
        """How many of the last tokens every head holds for its local window."""
        return min(*self.windows, len(self.ids))

    def html(self, path: Path | str, *, title: str = "What the cache kept") -> None:
        """Saves one page without further files: point at a token to see its heads."""
        Path(path).write_text(self._page(title), encoding="utf-8")

    def _repr_html_(self) -> str:
        """The page in a frame, which notebooks show."""
        inside = html.escape(self._page("What the cache kept"))
        return f'<iframe srcdoc="{inside}" width="100%" height="460" frameborder="0"></iframe>'

    def _page(self, title: str) -> str:
        layers, heads, _ = self.held.shape
        return page(
            title=title,
            pieces=self.pieces,
            share=(self.heads / (layers * heads)).tolist(),
            most=picture.darkest(self.heads / (layers * heads)),
            says=[self.why(token) for token in range(len(self.ids))],
            held=_rows(self.held),
            fraction=self.fraction,
            shape=(layers, heads),
            window=self.window,
        )

    def png(
        self,
        path: Path | str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        title: str = "What the cache kept",
    ) -> None:
        """Saves a picture: some of the text by token, and all heads by position."""
        example = Example(context_ids=self.ids, questions=())
        picture.draw(Path(path), self.held, tokenizer, example, title=title, window=self.window)


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
