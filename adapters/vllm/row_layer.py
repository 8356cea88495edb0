"""One layer of all rows, and what it decides about tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from ...admission import Admission, Write
from ...ops import ADMITTED, Ring
from ...selection import Selection
from ...spec import CacheSpec

KNOWN = 64 << 20  # bytes of decisions by position that are kept at most


@attrs.define(eq=False)
class RowLayer:
    """One layer of all rows: `ring` `[R, Hkv, W, ...]`, `table` `[R, Hkv, M]`, `counts`.

    `known` uint8 `[Hkv, N]` are the flags of all positions, where nothing else decides. `queries`
    `[R, Hq, S, D]` are the last ones, position p in slot `p % S`, where an eviction reads them.
    """

    index: int
    admission: Admission
    selection: Selection
    ring: Ring
    table: Tensor
    counts: Tensor
    known: Tensor | None = None
    queries: Tensor | None = None

    def decide(self, write: Write) -> tuple[Tensor | None, int]:
        """Flags of new tokens, uint8 `[Hkv, T]` or None, and bits that all of them get."""
        if self.admission.neutral:
            return None, ADMITTED
        if self.known is not None:
            return self.known.index_select(1, write.positions), 0
        return self.admission.admit(write).view(torch.uint8), 0


def look_ahead(layers: Sequence[RowLayer], spec: CacheSpec, longest: int) -> None:
    """Decides for all positions below `longest`, so that a decode step looks them up in one launch.

    For admissions that go by position.
    """
    at = torch.arange(longest, device=spec.device)
    key = torch.zeros((), dtype=spec.dtype, device=spec.device)
    key = key.expand(spec.kv_heads, longest, spec.head_dim)
    cu = torch.tensor([0, longest], dtype=torch.int32, device=spec.device)
    for layer in layers:
        if not layer.admission.neutral:
            write = Write(key, key, at, cu, layer.index, spec.head_ids)
            layer.known = layer.admission.admit(write).view(torch.uint8)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a policy, and of policies and modules inside it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_of(one)
    elif attrs.has(type(value)) or isinstance(value, Admission | Selection):
        names = (
            [field.name for field in attrs.fields(type(value))] if attrs.has(type(value)) else []
        )
        own = {name: getattr(value, name) for name in names}
        yield from tensors_of({**own, **getattr(value, "__dict__", {})})
