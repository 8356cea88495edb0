"""The sequences that an eviction is due for, as a cache of their own that is only read."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..store.layer import LayerStore
from ..store.state import CacheState


class DueRows:
    """Sequences `rows` of a cache: what scores them sees no other and takes no time for any.

    `state` has their numbers, on host and devices, and no layers; `of` gives those one by one, as
    rings are copied. Pages are the cache's own.
    """

    def __init__(self, whole: CacheState, rows: Sequence[int]) -> None:
        self.rows, self.batch = list(rows), whole.batch
        self.state = whole.shell(len(self.rows))
        self.state.sequences = [whole.sequences[row] for row in self.rows]
        self._index: dict[torch.device, Tensor] = {}
        for layer in whole.layers:
            if layer.device not in self._index:
                index = torch.tensor(self.rows, device=layer.device)
                self._index[layer.device] = index
                own, all_rows = self.state.on(layer), whole.on(layer)
                own.lengths.copy_(all_rows.lengths[index])
                own.active.copy_(all_rows.active[index])
                own.final.copy_(all_rows.final[index])

    def of(self, layer: LayerStore) -> LayerStore:
        """A layer with these sequences alone; its tables and rings are copies."""
        part = copy.copy(layer)
        part.take_buffers(
            self.pick(layer.table), {name: self.pick(x) for name, x in layer.buffers.items()}
        )
        return part

    def pick(self, tensor: Tensor) -> Tensor:
        """The rows of a tensor `[B, ...]`."""
        return tensor.index_select(0, self._index[tensor.device])

    def spread(self, part: Tensor, width: int, other: bool | float) -> Tensor:
        """`[B, H, width]` of `[rows, H, n]`; what is not there is `other`."""
        whole = part.new_full((self.batch, part.shape[1], width), other)
        whole[self._index[part.device], :, : part.shape[2]] = part
        return whole
