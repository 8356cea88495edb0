"""What one cache holds and reserves of a pool."""

from __future__ import annotations

from typing import Protocol

import attrs
from torch import Tensor


class HasTable(Protocol):
    """A layer: its page table int32 `[B, Hkv, M]` may be replaced by a wider one."""

    table: Tensor


@attrs.define(eq=False)
class Lease:
    """One cache's part of a pool: the layers whose tables hold pages, and pages `reserved` for it.

    Reserved pages are free and nobody else's, until the cache reserves again.
    """

    layers: list[HasTable] = attrs.field(factory=list)
    reserved: int = 0
