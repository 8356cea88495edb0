"""One forward of a batch: which columns are real, and how layers see them."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from ...pipeline import CachePipeline
from ...store import CacheState


@attrs.define(eq=False)
class Columns:
    """How the columns of one forward map to the pipeline's packed or decode layout.

    `prompt` and `decode` are numbers of columns; one of them is 0. `index` `[T]` picks the real
    tokens of the prompt columns out of `[B * prompt]`; None when all are real.
    """

    batch: int
    prompt: int
    decode: int
    index: Tensor | None = None
    valid: Tensor | None = None  # [B, S] on the host
    there: dict[torch.device, Tensor] = attrs.field(factory=dict)  # `index` by device

    def attend(
        self,
        pipeline: CachePipeline,
        state: CacheState,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pre: Tensor | None,
        query_pre: Tensor | None,
        hidden: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention `[B, Hq, S, D]` of one layer; `pre` and others `[B, H, S, D]`."""
        if not self.prompt:
            return pipeline.attend(
                state,
                layer,
                query,
                key,
                value,
                key_pre=pre,
                query_pre=query_pre,
                hidden=hidden,
                sinks=sinks,
            )
        packed = pipeline.attend(
            state,
            layer,
            self.pack(query),
            self.pack(key),
            self.pack(value),
            key_pre=None if pre is None else self.pack(pre),
            query_pre=None if query_pre is None else self.pack(query_pre),
            hidden=None if hidden is None else self.pack(hidden[:, None])[0],
            sinks=sinks,
        )
        return self._unpack(packed)

    def attend_shared(
        self,
        pipeline: CachePipeline,
        state: CacheState,
        layer: int,
        query: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention `[B, Hq, S, D]` of another layer's query over the keys of `layer`.

        The query may be of a prompt's last columns alone.
        """
        if not self.prompt:
            return pipeline.attend_shared(state, layer, query, sinks=sinks)
        columns = query.shape[2]
        if columns == self.prompt:
            out = pipeline.attend_shared(state, layer, self.pack(query), sinks=sinks)
            return self._unpack(out)
        valid = None if self.valid is None else self.valid[:, -columns:]
        part, last = prompt_columns(
            self.batch, columns, None if valid is None else valid.to(query.device)
        )
        out = pipeline.attend_shared(state, layer, part.pack(query), sinks=sinks, last=last)
        return part._unpack(out)

    def _unpack(self, packed: Tensor) -> Tensor:
        """Real tokens `[H, T, D]` to `[B, H, S, D]`, zeros elsewhere."""
        heads, _, dim = packed.shape
        rows = packed.transpose(0, 1)
        if self.index is not None:
            out = rows.new_zeros(self.batch * self.prompt, heads, dim)
            rows = out.index_copy_(0, self._places(rows.device), rows)
        return rows.reshape(self.batch, self.prompt, heads, dim).transpose(1, 2)

    def pack(self, x: Tensor) -> Tensor:
        """`[B, H, S, D]` to the real tokens `[H, T, D]`."""
        rows = x.transpose(1, 2).flatten(0, 1)
        if self.index is not None:
            rows = rows.index_select(0, self._places(rows.device))
        return rows.transpose(0, 1)

    def _places(self, device: torch.device) -> Tensor:
        """`index` on `device`, copied there once."""
        assert self.index is not None
        if device not in self.there:
            self.there[device] = self.index.to(device)
        return self.there[device]


def prompt_columns(batch: int, columns: int, mask: Tensor | None) -> tuple[Columns, list[int]]:
    """The columns of a prompt call and each sequence's real tokens; reads the mask once."""
    if mask is None or bool(mask.all()):
        return Columns(batch, columns, 0), [columns] * batch
    real = mask.bool()
    index = real.flatten().nonzero().squeeze(1)
    host = real.cpu()
    return Columns(batch, columns, 0, index, host), host.sum(1).tolist()


def decode_columns(
    batch: int, columns: int, mask: Tensor | None
) -> tuple[Columns, list[int], Tensor | None]:
    """The columns of a decode call, each sequence's real tokens, and `valid` for `begin`."""
    if mask is None or bool(mask.all()):
        valid = None
        if columns > 1:
            valid = torch.ones(batch, columns, dtype=torch.bool)
        return Columns(batch, 0, columns), [columns] * batch, valid
    host = mask.bool().cpu()
    return Columns(batch, 0, columns, None, host), host.sum(1).tolist(), host
