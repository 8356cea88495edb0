"""A run of a model by its own attention, which is what ours is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .probe_masks import MaskFunction
from .runs import OWN, forwards


@attrs.frozen(eq=False, kw_only=True)
class OwnCall:
    """One call of a model's own attention function.

    Attributes:
        module: the attention module.
        query, key, value: what it was given.
        output: `[B, S, Hq, Dv]`, and `exact` the same computed from wider copies.
        mask: the function that made its mask; None where that is not known.
        past: columns before the first query.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    exact: Tensor
    mask: MaskFunction | None
    past: int


class OwnRun:
    """A model's eager attention on transformers' own cache, with what it was given and gave."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, list[OwnCall]()
        self.masks: dict[int, tuple[Tensor, MaskFunction]] = {}
        self.past = 0

    def run(self, tokens: Tensor) -> list[Tensor]:
        """Logits of the prompt and of each step."""
        return forwards(self, OWN, tokens, DynamicCache(config=self.model.config))

    def begin(self, past: int) -> None:
        self.past = past
        self.masks.clear()

    def mask(self, **arguments: Any) -> Tensor | None:
        made: Tensor | None = eager_mask(**arguments)
        function = arguments.get("mask_function")
        if made is not None and function is not None:
            self.masks[made.untyped_storage().data_ptr()] = made, function
        return made

    def attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any
    ) -> Any:
        function = own_attention(module)
        output, weights = function(module, query, key, value, mask, **given)
        wide = torch.promote_types(query.dtype, torch.float32)
        wider = [
            x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in (query, key, value, mask)
        ]
        exact, _ = function(module, *wider, **given)
        self.calls.append(
            OwnCall(
                module=module,
                query=query,
                key=key,
                value=value,
                output=output,
                exact=exact,
                mask=self._function_of(mask),
                past=self.past,
            )
        )
        return output, weights

    def _function_of(self, mask: Any) -> MaskFunction | None:
        """What made `mask`; of one that was copied to another device, if no other made the same."""
        if not isinstance(mask, Tensor):
            return None
        found = self.masks.get(mask.untyped_storage().data_ptr())
        if found is not None:
            return found[1]
        alike = [
            function
            for made, function in self.masks.values()
            if made.device != mask.device and torch.equal(made.to(mask.device), mask)
        ]
        return alike[0] if len(alike) == 1 else None


def own_attention(module: Any) -> Callable[..., Any]:
    """The attention that a model's own code defines, beside the module's forward."""
    defined = getattr(type(module).forward, "__globals__", {}).get("eager_attention_forward")
    found: Callable[..., Any] = defined or ALL_ATTENTION_FUNCTIONS["sdpa"]
    return found
