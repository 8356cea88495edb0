"""Position ids of a forward: those that it counts itself, and given ones that go on from these."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UnsupportedError
from .cache import KVPolicyCache
from .modes import ordinary


def first_position(cache: KVPolicyCache, own: int | None) -> int:
    """Position of a sequence's first token: the model's `own`, 0 as transformers' generate has it.

    A generate that leaves position ids to the model has its own.

    Raises UnsupportedError where the model's own is not known.
    """
    if cache.counts_positions and not cache.counts_own:
        return 0
    if own is None:
        raise UnsupportedError(
            "position_ids: this model counts positions by a rule of its own; pass them"
        )
    return own


@ordinary
def true_positions(
    cache: KVPolicyCache, device: torch.device, first: int = 0, counted: Tensor | None = None
) -> Tensor:
    """Position ids `[B, S]` of the open forward: each sequence's real tokens from `first`.

    Those that are not `counted` `[B, S]` are all at the position before.
    """
    state, layout = cache.state, cache.layout
    assert state is not None and layout is not None
    start = state.on(state.layers[0]).lengths.to(device)[:, None]
    start = start + first if first else start
    columns = layout.prompt + layout.decode
    valid = None if layout.valid is None else layout.valid.to(device)
    if counted is None:
        if valid is None:
            return start + torch.arange(columns, device=device)
        return (start - 1 + valid.long().cumsum(1)).clamp(min=first)
    known = counted if valid is None else counted & valid
    places = (start - 1 + known.long().cumsum(1)).clamp(min=first)
    return torch.where(counted, places, first - 1)


@ordinary
def check_counted(cache: KVPolicyCache, places: Tensor, first: int) -> None:
    """Raises UnsupportedError where given `places` do not go on from what earlier forwards counted.

    These had none given and counted real tokens from `first`, where transformers counts columns:
    the same until columns are hidden.
    """
    layout = cache.layout
    assert layout is not None
    hidden = ~cache.real().all(1)
    if not bool(hidden.any()):
        return
    wanted = true_positions(cache, torch.device("cpu"), first)
    given = places.cpu().expand_as(wanted) if places.ndim == 2 else places[0].cpu()
    valid = torch.ones_like(wanted) if layout.valid is None else layout.valid.cpu().long()
    at = valid.argmax(1, keepdim=True)  # of each row's first token
    off = (given.gather(1, at) != wanted.gather(1, at))[:, 0] & valid.any(1) & hidden
    if bool(off.any()):
        row = int(off.nonzero()[0])
        raise UnsupportedError(
            f"position_ids: earlier forwards without them counted real tokens, of which row {row} "
            f"has seen {int(wanted[row, at[row]]) - first}, got {given[row, at[row]].item()} for "
            "the next; leave them out, or pass them to every forward"
        )
