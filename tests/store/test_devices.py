"""What a cache keeps on its devices: reservations in several pools hold together or not at all."""

from __future__ import annotations

import pytest
import torch

from kvpolicy import CapacityError
from kvpolicy.store.devices import Devices
from kvpolicy.store.pool import PagePool

CPU = torch.device("cpu")


def pool(limit: int | None = None) -> PagePool:
    made = PagePool(
        page_size=2, head_dim=4, dtype=torch.float32, device=CPU, summary=None, moving=True,
        copy=lambda *places: None,
    )  # fmt: skip
    made.limit = limit
    return made


@pytest.mark.parametrize("call", ["reserve", "provide"])
def test_a_limit_of_one_pool_leaves_the_others(call: str) -> None:
    free, full = pool(), pool(limit=5)
    devices = Devices([CPU], [free, full], 1)
    devices.reserve({free: 3, full: 2})
    with pytest.raises(CapacityError):
        getattr(devices, call)({free: 7, full: 70})
    assert (free.reserved, full.reserved) == (3, 2)
    devices.provide({free: 7, full: 4})
    assert (free.reserved, full.reserved) == (0, 0)
