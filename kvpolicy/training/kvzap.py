"""KVzap for a model: a line from each layer's attention input to the logarithm of KVzip's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from .._fields import check_number
from ..adapters.hf import attach, repeats
from ..admission import Write
from ..budget import Ratio
from ..eviction import EvictionView, KVzip
from ..pipeline import CachePipeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAST = 2.0**-24  # of a score whose logarithm is taken


@attrs.frozen(kw_only=True, eq=False)
class _Told(KVzip):
    """KVzip that tells by layer what tokens were computed from, and what they scored."""

    inputs: dict[int, list[Tensor]] = attrs.field(factory=dict, repr=False)
    found: dict[int, tuple[Tensor, Tensor]] = attrs.field(factory=dict, repr=False)
    needs = frozenset({"hidden"})

    def mark(self, write: Write) -> Tensor | None:
        if write.hidden is not None:
            self.inputs.setdefault(write.layer, []).append(write.hidden)
        return None

    def score(self, view: EvictionView) -> Tensor:
        assert view.numbers is not None
        used = int(view.valid[0, 0].sum())
        self.found[view.layer] = (view.positions[0, 0, :used], view.numbers[0, :, :used])
        return super().score(view)


@torch.no_grad()
def fit_kvzap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Tensor],
    *,
    ridge: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """`w2` `[L, Hkv, hidden]` and `b2` `[L, Hkv]` for `KVzap`, fp32 on the CPU.

    Every text is read and repeated as KVzip's contexts are; the logarithms of its scores are then
    fitted by least squares, with `ridge` times the mean square of the inputs on the weights. The
    authors fit KVzip+'s scores, in which weights are multiplied by the sizes of values; here
    they are KVzip's own.

    Args:
        model: with nothing attached.
        tokenizer: of the request to repeat.
        texts: token ids `[N]`.
        ridge: how much weights are held back.

    Raises:
        ValueError: no text, or a `ridge` below 0.
        UnsupportedError: the adapter does not serve the model.

    Source: Jégou and Jeblick, 2026 (KVzap's linear form); Kim et al., 2025 (the scores).
    """
    if not texts:
        raise ValueError("texts: wanted one or more, got none")
    check_number("ridge", ridge, "a number of at least 0", lambda x: x >= 0)
    squares: dict[int, Tensor] = {}
    products: dict[int, Tensor] = {}
    for ids in texts:
        for layer, (inputs, logarithms) in _scored(model, tokenizer, ids).items():
            ones = torch.cat([inputs.double(), inputs.new_ones(len(inputs), 1).double()], 1)
            squares[layer] = squares.get(layer, 0) + ones.mT @ ones
            products[layer] = products.get(layer, 0) + ones.mT @ logarithms.double().mT
    weights = []
    for layer in sorted(squares):
        square = squares[layer]
        count = square.shape[0] - 1
        held = square.diagonal()[:count].mean() * ridge
        square = square + torch.diag(held * (torch.arange(count + 1, device=square.device) < count))
        weights.append(torch.linalg.solve(square, products[layer]).mT)  # [Hkv, hidden + 1]
    found = torch.stack(weights).float().cpu()
    return found[..., :-1].contiguous(), found[..., -1].contiguous()


def _scored(model: Any, tokenizer: Any, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Inputs `[n, hidden]` and the logarithms of KVzip's scores `[Hkv, n]` by layer."""
    told = _Told(budget=Ratio(1.0))
    context = ids.to(model.device)[None]
    with attach(model, CachePipeline(eviction=told, window=1)) as attached:
        cache = attached.new_cache()
        cache.begin_prompt()
        attached.decoder(input_ids=context, past_key_values=cache, use_cache=True)
        inputs = {layer: torch.cat(parts) for layer, parts in told.inputs.items()}
        for again, span in repeats(tokenizer, context):
            attached.replay(cache, again, span=span)
        cache.end_prompt()
    return {
        layer: (inputs[layer][positions.long()], numbers.clamp(min=_LEAST).log())
        for layer, (positions, numbers) in told.found.items()
    }
