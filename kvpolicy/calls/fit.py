"""Whether policies fit a model and its caches, before one is made."""

from __future__ import annotations

from ..admission import Admission
from ..budget import budget_of
from ..errors import UnsupportedError
from ..eviction import Eviction
from ..exchange import Exchange
from ..selection import Selection
from ..spec import CacheSpec
from . import capacity


def check_policies(
    admission: Admission,
    selection: Selection,
    eviction: Eviction,
    spec: CacheSpec,
    window: int,
    exchange: Exchange | None,
) -> None:
    """Raises ValueError or UnsupportedError for the first that does not fit `spec`."""
    elsewhere = spec.model_kv_heads - spec.kv_heads
    managed = [spec.at(layer) for layer in spec.managed]
    for heads, dim in dict.fromkeys((x.kv_heads, x.head_dim) for x in managed):
        for policy in (admission, selection, eviction):
            policy.check(spec.layers, heads + elsewhere, dim)
    for layer in range(spec.layers):
        selects, evicts = selection.at(layer), eviction.at(layer)
        selects.check_window(window)
        evicts.check_window(window)
        budget = budget_of(evicts)
        if budget is not None and spec.slides(layer) is None:
            budget.check_model(spec.layers, spec.at(layer).kv_heads + elsewhere)
        capacity.check(spec, layer, window, evicts)
        if evicts.hidden and spec.hidden is None:
            raise ValueError(
                f"hidden: {type(evicts).__name__} reads attention inputs; wanted their channels, "
                "write CacheSpec(hidden=...)"
            )
        if spec.kv_heads < spec.model_kv_heads:
            _check_shard(evicts, exchange)


def _check_shard(eviction: Eviction, exchange: Exchange | None) -> None:
    budget = budget_of(eviction)
    if exchange is None and budget is not None and budget.shares_heads:
        raise UnsupportedError(
            f"{type(eviction).__name__}.budget: {budget} shares tokens between KV heads, but a "
            "tensor-parallel rank sees only its own; give init an `exchange` with the others"
        )
    if eviction.across_heads and (exchange is None or not eviction.gathers_heads):
        how = "give init an `exchange` with the others"
        if not eviction.gathers_heads:
            how = "ask for the others by view.across or view.whole, and say `gathers_heads = True`"
        raise UnsupportedError(
            f"{type(eviction).__name__}: scores look across KV heads, but a tensor-parallel rank "
            f"sees only its own; {how}"
        )
