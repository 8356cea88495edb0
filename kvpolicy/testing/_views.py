"""Random stored tokens as an eviction sees them, and what must not matter in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eviction import EvictionView
from ._asked import OF_MODEL, one_head_asked, one_row_asked, poisoned_asked

GARBAGE = 1e3  # a view holds zeros where nothing is valid; other finite values must do as well


def random_view(
    layer: int,
    queries: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int,
    dtype: torch.dtype,
    seed: int,
    numbers: bool = False,
) -> EvictionView:
    """Four sequences, the last all in its window; an empty head; zeros where not valid."""
    rng = torch.Generator().manual_seed(seed * 1000 + layer)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    lengths = torch.tensor([window + 60, window + 31, window + 2, max(window // 2, 1)])
    width = 48
    outside = lengths - window  # positions that have left the window
    # Every head holds a random subset of them, in rising order.
    chosen = torch.rand(4, kv_heads, 60, generator=rng) < 0.7
    chosen &= torch.arange(60) < outside[:, None, None]
    chosen[2, 0] = False
    counts = chosen.sum(-1).clamp(max=width)
    order = chosen.int().sort(dim=-1, descending=True, stable=True).indices[..., :width]
    valid = torch.arange(width) < counts[..., None]
    marked = (torch.rand(valid.shape, generator=rng) < 0.5) & valid
    recent = lengths[:, None] - window + torch.arange(window)
    at = lengths[:, None] - queries + torch.arange(queries)
    return EvictionView(
        layer=layer,
        keys=draw(4, kv_heads, width, head_dim).masked_fill(~valid[..., None], 0),
        values=draw(4, kv_heads, width, head_dim).masked_fill(~valid[..., None], 0),
        positions=order.masked_fill(~valid, 0),
        valid=valid,
        marked=marked,
        recent_keys=draw(4, kv_heads, window, head_dim).masked_fill(
            (recent < 0)[:, None, :, None], 0
        ),
        recent_valid=recent >= 0,
        lengths=lengths,
        scale=head_dim**-0.5,
        queries=draw(4, kv_heads * group, queries, head_dim) if queries else None,
        query_valid=at >= 0 if queries else None,
        group=group,
        numbers=_drawn(valid, rng) if numbers else None,
        recent_numbers=_drawn((recent >= 0)[:, None].expand(-1, kv_heads, -1), rng)
        if numbers
        else None,
        recent_values=draw(4, kv_heads, window, head_dim).masked_fill(
            (recent < 0)[:, None, :, None], 0
        ),
    )


def _drawn(where: Tensor, rng: torch.Generator) -> Tensor:
    """Numbers between 0 and 1, as weights and gates are."""
    return torch.rand(where.shape, generator=rng).masked_fill(~where, 0)


def poisoned(view: EvictionView) -> EvictionView:
    """Garbage wherever the view says that nothing is valid."""
    hide = ~view.valid[..., None]
    queries, view = view.queries, poisoned_asked(view, GARBAGE)
    if queries is not None and view.query_valid is not None:
        queries = queries.masked_fill(~view.query_valid[:, None, :, None], GARBAGE)
    return view._replace(
        keys=view.keys.masked_fill(hide, GARBAGE),
        values=view.values.masked_fill(hide, GARBAGE),
        positions=view.positions.masked_fill(~view.valid, 7),
        marked=view.marked | ~view.valid,
        recent_keys=view.recent_keys.masked_fill(~view.recent_valid[:, None, :, None], GARBAGE),
        queries=queries,
        **_numbers_of(
            view,
            lambda x: x.masked_fill(~view.valid, GARBAGE),
            lambda x: x.masked_fill(~view.recent_valid[:, None], GARBAGE),
        ),
    )


def widened(view: EvictionView, extra: int) -> EvictionView:
    """The same tokens with `extra` more invalid slots."""
    return view._replace(
        keys=F.pad(view.keys, (0, 0, 0, extra)),
        values=F.pad(view.values, (0, 0, 0, extra)),
        positions=F.pad(view.positions, (0, extra)),
        valid=F.pad(view.valid, (0, extra)),
        marked=F.pad(view.marked, (0, extra)),
        **_numbers_of(view, lambda x: F.pad(x, (0, extra)), lambda x: x),
    )


def _numbers_of(
    view: EvictionView, of: Callable[[Tensor], Tensor], recent: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Changed numbers of global and of recent tokens, where a view has any."""
    if view.numbers is None or view.recent_numbers is None:
        return {}
    return {"numbers": of(view.numbers), "recent_numbers": recent(view.recent_numbers)}


def one_row(view: EvictionView, row: int) -> EvictionView:
    """One sequence alone."""
    named = view._asdict()
    tensors = [n for n, x in named.items() if isinstance(x, Tensor) and n not in OF_MODEL]
    rows = {name: named[name][row : row + 1] for name in tensors}
    return one_row_asked(view._replace(**rows), row)


def one_head(view: EvictionView, head: int) -> EvictionView:
    """One KV head and its query heads alone."""
    names = ("keys", "values", "positions", "valid", "marked", "recent_keys")
    parts = {name: getattr(view, name)[:, head : head + 1] for name in names}
    if view.queries is not None:
        parts["queries"] = view.queries.chunk(view.keys.shape[1], 1)[head]
    part = slice(head, head + 1)
    parts |= _numbers_of(view, lambda x: x[:, part], lambda x: x[:, part])
    return one_head_asked(view._replace(**parts), head)
