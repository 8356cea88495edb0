"""What the states of a model's own layers carry: hidden columns, and a forward's into the next."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .cut import cut_model, why_not_in_place
from .runs import logits_of
from .untouched import untouched

HIDDEN = 3  # columns before the prompt
# Of the logits' spread: rounding stays far below it, what a hidden or forgotten token does is more.
_TRACE = 1e-2


class Carried:
    """A model on its own cache, behind hidden columns and in two forwards, beside one forward.

    `tokens` `[1, S]`. In 16 bits, whose rounding would hide differences, a narrow random model of
    the same config stands in where one can be made.

    Attributes:
        hides: whether hidden columns on the left leave no trace.
        goes_on: whether a forward of several columns goes on from the states.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model = _wide(model)
        embeddings = self.model.get_input_embeddings().weight
        tokens = tokens.to(embeddings.device) % embeddings.shape[0]
        with untouched(self.model):
            whole = self._run(tokens, torch.arange(tokens.shape[1]), use_cache=False)
            self.hides = self._alike(lambda: self._behind(tokens), whole)
            self.goes_on = self._alike(lambda: self._halves(tokens), whole)

    def _behind(self, tokens: Tensor) -> Tensor:
        ids = torch.cat([tokens[:, :HIDDEN], tokens], 1)
        mask = torch.ones_like(ids)
        mask[:, :HIDDEN] = 0
        places = (mask[0].cumsum(0) - 1).clamp(min=0)
        return self._run(ids, places, attention_mask=mask, use_cache=False)[:, HIDDEN:]

    def _halves(self, tokens: Tensor) -> Tensor:
        cache, half = DynamicCache(config=self.model.config), tokens.shape[1] // 2
        places = torch.arange(tokens.shape[1])
        parts = zip(tokens.split(half, 1), places.split(half), strict=True)
        return torch.cat([self._run(x, at, past_key_values=cache) for x, at in parts], 1)

    def _run(self, ids: Tensor, places: Tensor, **given: Any) -> Tensor:
        """Logits `[1, S, V]`; positions are given to models that take them."""
        given["input_ids"] = ids
        try:
            out = self.model(**given, position_ids=places[None].to(ids.device))
        except TypeError:
            out = self.model(**given)
        return logits_of(out)

    def _alike(self, run: Any, whole: Tensor) -> bool:
        try:
            far = (run() - whole).abs().max()
        except (TypeError, ValueError, RuntimeError):  # it does not run so at all
            return False
        return bool(far <= max(_TRACE, 16 * torch.finfo(whole.dtype).eps) * whole.std())


def _wide(model: Any, alone: bool = False) -> Any:
    """`model`, or in its place one of 32 bits, with `alone` on one rank, if that can be made."""
    shared = alone and why_not_in_place(model) == "its weights are sharded"
    if next(model.parameters()).dtype.itemsize >= 4 and not shared:
        return model
    try:
        return cut_model(model)
    except (TypeError, ValueError, RuntimeError):
        return model


FARTHEST = 1 << 17  # columns


class _Longer(DynamicCache):
    """A cache that tells attention modules of `more` columns than it holds."""

    def __init__(self, config: Any, modules: set[int], more: int) -> None:
        super().__init__(config=config)
        self.modules, self.more = modules, more

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        asker = sys._getframe(1).f_locals.get("self")
        length = int(super().get_seq_length(*args, **kwargs))
        return length + (self.more if id(asker) in self.modules else 0)


def counts_from(model: Any, names: Iterable[str], tokens: Tensor) -> int | None:
    """From how many columns on it shows that the attention modules `names` count them.

    None where it shows up to FARTHEST columns in nothing. In 16 bits, or where ranks share the
    model, which would have to agree on what they look for, a narrow random model of the same config
    stands in where one can be made.
    """
    wide = _wide(model, alone=True)
    held = dict(wide.named_modules())
    modules = {id(held[name]) for name in names if name in held}
    tokens = tokens.to(wide.get_input_embeddings().weight.device)
    tokens = tokens % wide.get_input_embeddings().weight.shape[0]

    def logits(more: int) -> Tensor:
        cache = _Longer(wide.config, modules, more)
        return logits_of(wide(input_ids=tokens, past_key_values=cache, use_cache=True))

    with untouched(wide):
        plain = logits(0)

        def shows(more: int) -> bool:
            return bool((logits(more) - plain).abs().max() > 1e-4 * plain.std())

        if not shows(FARTHEST):
            return None
        low, high = 0, FARTHEST
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if shows(middle) else (middle, high)
    return high + tokens.shape[1]
