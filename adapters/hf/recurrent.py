"""Recurrent and convolutional states of a model's own layers, in the cache beside ours.

They are transformers' own cache layers: what a token leaves in them cannot be taken back, so their
copies serve forks and forwards that fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from ...errors import RollbackError, UnsupportedError
from .rule.records import Probe

# Of a transformers layer: tensors by state, and what says whether they mean anything.
_STATES = ("conv_states", "recurrent_states")
_MARKS = (
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)


class States:
    """The states of one cache's layers, by the layers' places in the model."""

    def __init__(self, layers: Mapping[int, Any], probe: Probe) -> None:
        self.layers, self.probe = dict(layers), probe

    def __bool__(self) -> bool:
        return bool(self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(x.untyped_storage().nbytes() for _, x in self._tensors())

    @property
    def begun(self) -> bool:
        """Whether a token has left its trace."""
        return any(any(layer.has_previous_state.values()) for layer in self.layers.values())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for place, layer in self.layers.items():
            for name in _STATES:
                for state, tensor in getattr(layer, name).items():
                    if tensor is not None:
                        yield f"{place}.{name}.{state}", tensor

    def snapshot(self) -> list[dict[str, Any]]:
        """What `restore` puts back."""
        return [_copied(layer, None) for layer in self.layers.values()]

    def restore(self, saved: Sequence[dict[str, Any]]) -> None:
        """Puts a snapshot, or rows that `select` picked, in place: tensors keep their addresses."""
        for layer, values in zip(self.layers.values(), saved, strict=True):
            for name in _STATES:
                mine = getattr(layer, name)
                for state, tensor in values[name].items():
                    old = mine[state]
                    if tensor is not None and old is not None and old.shape == tensor.shape:
                        old.copy_(tensor)
                    else:
                        mine[state] = tensor
            for name in _MARKS:
                getattr(layer, name).update(values[name])
            layer.device, layer.dtype = values["device"], values["dtype"]

    def select(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Copies of the states of sequences `rows`; -1 stands for one that has seen nothing."""
        return [_copied(layer, rows) for layer in self.layers.values()]

    def move(self, slot: int, source: States, row: int, slots: int) -> None:
        """Makes the states of sequence `row` of `source` those of `slot`, of `slots` in all.

        Tensors keep their addresses, those that are not there yet are made. `row` has seen nothing
        afterwards.
        """
        self.put(slot, source.select([row]), slots)
        source.clear([row])

    def put(self, slot: int, saved: Sequence[dict[str, Any]], slots: int) -> None:
        """Writes what `select` picked of one sequence, from any device, to `slot` of `slots`."""
        for layer, values in zip(self.layers.values(), saved, strict=True):
            for name in _STATES:
                mine = getattr(layer, name)
                for state, tensor in values[name].items():
                    if tensor is None:
                        continue
                    if mine[state] is None:
                        shape, device = (slots, *tensor.shape[1:]), values["device"]
                        mine[state] = tensor.new_zeros(shape, device=device or tensor.device)
                    mine[state][slot].copy_(tensor[0])
            for name in _MARKS:
                known = {key: mark for key, mark in values[name].items() if mark}
                getattr(layer, name).update(known)
            layer.device, layer.dtype = values["device"], values["dtype"]

    def park(self, row: int) -> list[dict[str, Any]]:
        """The states of a sequence in the host's memory, for `put`; it has seen nothing then.

        Every decoded column changes the states of all sequences, of those that are not active too.
        So park one before it waits, or it cannot go on.
        """
        saved = self.select([row])
        for values in saved:
            for name in _STATES:
                for state, tensor in values[name].items():
                    if tensor is not None:
                        values["device"] = values["device"] or tensor.device
                        values[name][state] = tensor.cpu()
        self.clear([row])
        return saved

    def clear(self, rows: Sequence[int]) -> None:
        """Sequences `rows` have seen nothing from now on; tensors keep their addresses."""
        for layer in self.layers.values():
            for name in _STATES:
                for state, tensor in getattr(layer, name).items():
                    if tensor is None:
                        continue
                    tensor.index_fill_(0, torch.tensor(list(rows), device=tensor.device), 0)
                    if {*rows} >= {*range(len(tensor))}:  # of nobody anything
                        layer.has_previous_state[state] = False

    def reset(self) -> None:
        """Forgets everything."""
        for layer in self.layers.values():
            LinearAttentionCacheLayerMixin.reset(layer)  # of a hybrid layer that part alone

    def to_tensors(self) -> dict[str, Tensor]:
        """The states for a file, by place, kind and number."""
        return {f"state.{name}": tensor for name, tensor in self._tensors()} if self.begun else {}

    def from_tensors(
        self, filed: Mapping[str, Tensor], batch: int, device_at: Callable[[int], torch.device]
    ) -> None:
        """Takes the states that `to_tensors` filed, of `batch` sequences, to each layer's device.

        Raises ValueError for states of other layers, or of another number of sequences.
        """
        named = {name: x for name, x in filed.items() if name.startswith("state.")}
        places = {name.split(".")[1] for name in named}
        if places != {str(place) for place in self.layers}:
            raise ValueError(
                f"path: altered: wanted states of layers {_listed(self.layers)}, got those of "
                f"{', '.join(sorted(places)) or 'none'}"
            )
        for name, tensor in named.items():
            _, place, kind, state = name.split(".")
            layer = self.layers[int(place)]
            if kind not in _STATES or tensor.shape[0] != batch:
                raise ValueError(f"path: altered: {name} does not fit {batch} sequences")
            device = device_at(int(place))
            getattr(layer, kind)[int(state)] = tensor.to(device)
            getattr(layer, f"is_{kind}_initialized")[int(state)] = True
            layer.has_previous_state[int(state)] = True
            if kind == "conv_states":
                layer.conv_kernel_size[int(state)] = tensor.shape[-1]
                layer.device, layer.dtype = device, tensor.dtype

    def refuse_crop(self) -> None:
        """Raises RollbackError where a token cannot be taken back."""
        if self.layers:
            raise RollbackError(
                f"crop: layers {_listed(self.layers)} keep a recurrent or convolutional state, "
                "from which tokens cannot be taken back; fork the cache before them"
            )

    def settle(self) -> None:
        """Makes tensors that inference mode made writable outside it."""
        for layer in self.layers.values():
            for name in _STATES:
                for state, tensor in getattr(layer, name).items():
                    if tensor is not None and tensor.is_inference():
                        getattr(layer, name)[state] = tensor.clone()

    def check(
        self,
        columns: int,
        mask: Tensor | None,
        active: Sequence[bool],
        gapped: Sequence[bool],
        packed: bool,
    ) -> None:
        """Raises UnsupportedError if the states would not be those of the real columns alone.

        `mask` `[B, columns]` is about the new columns. Only columns before a sequence's first token
        are kept out, and only by the first forward; `gapped` are sequences with others by now.
        `packed` says that rows hold several texts.
        """
        if columns > 1 and self.begun and not self.probe.goes_on:
            raise UnsupportedError(
                f"input_ids: {columns} columns after others, but layers {_listed(self.layers)} of "
                "this model go on from their states by one column at a time; give a prompt in one "
                "forward, and single columns after it"
            )
        if packed:
            self._refuse("position_ids pack several texts in a row")
        if any(gap and on for gap, on in zip(gapped, active, strict=True)):
            self._refuse("a sequence that had ended, or was padded on the right, goes on")
        if mask is None or bool(mask.all()):
            return
        if self.begun:
            self._refuse("a mask hides columns after the first forward")
        if bool((mask.bool().long().diff(dim=1) < 0).any()):
            self._refuse("a mask hides columns after a sequence's first token")

    def _refuse(self, what: str) -> None:
        raise UnsupportedError(
            f"attention_mask: {what}, but layers {_listed(self.layers)} keep a recurrent or "
            "convolutional state that takes in every column; pad on the left, and start a new "
            "cache for a turn after rows of different lengths"
        )


def _listed(places: Mapping[int, Any]) -> str:
    names = [str(place) for place in places]
    return ", ".join(names if len(names) < 5 else [*names[:3], "..."])


def _copied(layer: Any, rows: Sequence[int] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"device": layer.device, "dtype": layer.dtype}
    for name in _STATES:
        found[name] = {
            state: None if tensor is None else _rows(tensor, rows)
            for state, tensor in getattr(layer, name).items()
        }
    return found | {name: dict(getattr(layer, name)) for name in _MARKS}


def _rows(tensor: Tensor, rows: Sequence[int] | None) -> Tensor:
    if rows is None:
        return tensor.clone()
    index = torch.tensor([max(row, 0) for row in rows], device=tensor.device)
    empty = torch.tensor([row < 0 for row in rows], device=tensor.device)
    picked = tensor.index_select(0, index)
    return picked.masked_fill_(empty.view(-1, *[1] * (picked.ndim - 1)), 0)
