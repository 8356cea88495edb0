"""What ops refuse of their arguments, alike in every backend."""

from __future__ import annotations

from torch import Tensor

from .values import Pages


def check_asked(
    op: str, heads: int, softcap: float | None, sinks: Tensor | None, chunk: int | None = None
) -> None:
    """Raises ValueError for a softcap, sinks or a chunk that attention of `heads` cannot have."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap: wanted a positive number or None, got {softcap}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"{op}: sinks: wanted [{heads}], a query head each, got {[*sinks.shape]}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{op}: chunk: wanted a positive number or None, got {chunk}")


def check_minmax(op: str, pages: Pages) -> None:
    """Raises ValueError for pages without room for a smallest and a largest key."""
    width = 2 * pages.k.shape[2]
    if pages.summary is None or pages.summary.shape[1] != width:
        raise ValueError(f"{op}: minmax wants summaries [n, {width}] in pages.summary")
