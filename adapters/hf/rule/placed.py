"""How a model counts positions of its own, and whether it tells texts apart by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import eager_mask

from .own_run import own_attention
from .runs import OWN, PROMPT, named
from .untouched import untouched

SECOND = 6  # column where a second text begins
_SAME = 1e-2  # of the logits' spread: rounding stays far below it, another position is more


class Placed:
    """Forwards of tokens `[1, S]` without a cache, at positions other than those from 0.

    Attributes:
        first: the position that the model gives to a sequence's first token; None where it counts
            by no rule that is known.
        skips: the id that such a count leaves out, at the position before `first`, if there is one.
        apart: axes of `position_ids` whose restart is a new text, by the model's own masks: 2 of
            `[B, S]`, 3 of `[4, B, S]`, whose first row counts the tokens.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens[:, :PROMPT]
        self.told: list[bool] = []  # of each mask, whether it hides the first text from the second
        self.apart: frozenset[int] = frozenset()
        with untouched(model):
            self.first = self._first()
            self.skips = self._skips() if self.first else None
            count = torch.arange(PROMPT, device=tokens.device)
            places = torch.where(count < SECOND, count, count - SECOND)[None]
            for axes, given in ((2, places), (3, places.expand(4, 1, -1))):
                if self._tells(given):
                    self.apart |= {axes}

    def _first(self) -> int | None:
        try:
            own, zero = self._run(None), self._run(0)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it takes no position ids; whatever its own code says
            return 0
        if _same(own, zero):
            return 0
        for first in sorted({1, 2, *(pad + 1 for pad in _paddings(self.model))}):
            if _same(own, self._run(first)):
                return first
        return None

    def _skips(self) -> int | None:
        assert self.first is not None
        pad, tokens = self.first - 1, self.tokens.clone()
        tokens[:, SECOND] = pad
        counted = tokens != pad
        by_id = counted.long().cumsum(1) * counted + pad
        own, other = self._forward(None, tokens), self._forward(by_id, tokens)
        by_column = torch.arange(self.first, self.first + PROMPT, device=tokens.device)[None]
        return (
            pad if _same(own, other) and not _same(own, self._forward(by_column, tokens)) else None
        )

    def _tells(self, places: Tensor) -> bool:
        self.told.clear()
        try:
            self._forward(places)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it takes none of that shape
            return False
        return bool(self.told) and all(self.told)

    def _run(self, first: int | None) -> Tensor:
        if first is None:
            return self._forward(None)
        return self._forward(torch.arange(first, first + PROMPT, device=self.tokens.device)[None])

    def _forward(self, places: Tensor | None, tokens: Tensor | None = None) -> Tensor:
        tokens = self.tokens if tokens is None else tokens
        given = {} if places is None else {"position_ids": places}
        with named(self, OWN):
            out = self.model(input_ids=tokens, use_cache=False, **given)
        found: Tensor = out[0] if getattr(out, "logits", None) is None else out.logits
        return found

    def begin(self, past: int) -> None:
        """Not called: nothing comes before."""

    def mask(self, **arguments: Any) -> Tensor | None:
        function = arguments.get("mask_function")
        if function is not None:
            zero, at = (torch.tensor(n, device=self.tokens.device) for n in (0, SECOND))
            self.told.append(not bool(torch.as_tensor(function(zero, zero, at, at - 1))))
        made: Tensor | None = eager_mask(**arguments)
        return made

    def attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any
    ) -> Any:
        return own_attention(module)(module, query, key, value, mask, **given)


def _same(a: Tensor, b: Tensor) -> bool:
    far = (a.float() - b.float()).abs().max()
    return bool(far <= max(_SAME, 16 * torch.finfo(a.dtype).eps) * a.float().std(correction=0))


def _paddings(model: Any) -> list[int]:
    """The padding indices of a model's embeddings that may lie among its positions."""
    found = (getattr(m, "padding_idx", None) for m in model.modules() if isinstance(m, nn.Module))
    return [pad for pad in found if isinstance(pad, int) and 0 <= pad < PROMPT]
