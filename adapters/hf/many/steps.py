"""Decode steps of the sequences in slots, with what each is fed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture import Stepper
from ..decode_loop import experts
from .load import load_of
from .room import Room
from .sampling import choose
from .scheduler import Entry

Known = list[tuple[Entry, int]]  # tokens as the host gets to know them


class Steps:
    """Feeds every running sequence one token at a time.

    On a GPU the host gets tokens one step late, through pinned memory, so that it does not wait.
    """

    def __init__(self, model: Any, room: Room) -> None:
        self.model, self.room = model, room
        device, count = room.state.spec.device, room.slots
        self.tokens = torch.zeros(count, dtype=torch.long, device=device)
        self.places = torch.zeros(count, 1, dtype=torch.long, device=device)
        self.ends = torch.full((count, 1), -1, dtype=torch.long, device=device)
        self.stepper: Stepper | None = None
        self.slots: tuple[int, ...] = ()  # that `index` and `on` are of
        self.index, self.on = self.tokens[:0], self.tokens > 0
        self.late = int(device.type == "cuda")  # steps
        self.pending: list[Callable[[], Known]] = []

    def enter(self, entry: Entry, token: Tensor | int, made: int) -> None:
        """Sequence `entry`, in its slot, goes on with `token`, after `made` others of its own."""
        slot, load = entry.slot, load_of(entry)
        assert slot is not None
        self.tokens[slot] = token
        self.places[slot] = entry.prompt + made
        ends = sorted(load.options.ends)
        if len(ends) > self.ends.shape[1]:
            more = self.ends.new_full((self.room.slots, len(ends) - self.ends.shape[1]), -1)
            self.ends = torch.cat([self.ends, more], 1)
        self.ends[slot] = -1
        self.ends[slot, : len(ends)] = torch.tensor(ends, dtype=torch.long)

    def leave(self, slot: int) -> None:
        """A slot is empty: what it is fed does not matter, but must be in range."""
        self.tokens[slot] = self.places[slot] = 0

    def step(self, entries: Sequence[Entry]) -> None:
        """One step of `entries`, each of which wants another token.

        Raises CapacityError with nothing changed.
        """
        stepper = self._stepper()
        entries = sorted(entries, key=_slot)
        self._select(entries)
        loads = [load_of(entry) for entry in entries]
        active = self.on & (self.tokens[:, None] != self.ends).all(1)
        stepper.position = self.places
        stepper.room = max(load.options.most - load.made for load in loads)
        with experts(self.model):
            logits = stepper.step(self.tokens, active)[:, -1].to(self.tokens.device)
        self.places = self.places + self.on[:, None]
        chosen = choose(loads, logits if len(loads) == len(logits) else logits[self.index])
        self.tokens = self.tokens.index_copy(0, self.index, chosen)
        self.took(entries, chosen)

    def took(self, entries: Sequence[Entry], chosen: Tensor) -> None:
        """Sequences chose tokens `[N]`, which the host will be told."""
        for entry, token in zip(entries, chosen, strict=True):
            load_of(entry).chose(token)
        self.pending.append(_sent(list(entries), chosen))

    def known(self, all: bool = False) -> Known:
        """Tokens that the host may look at; `all`, or those that it need not wait for."""
        late = 0 if all else self.late
        ready = self.pending[: max(len(self.pending) - late, 0)]
        self.pending = self.pending[len(ready) :]
        return [pair for receive in ready for pair in receive()]

    def _stepper(self) -> Stepper:
        if self.stepper is None:
            self.stepper = Stepper(self.model, self.room.decoding, self.places, 1)
        return self.stepper

    def _select(self, entries: Sequence[Entry]) -> None:
        slots = tuple(map(_slot, entries))
        if slots != self.slots:
            device = self.tokens.device
            self.slots, self.index = slots, torch.tensor(slots, device=device)
            self.on = torch.zeros_like(self.on)
            self.on[self.index] = True


def _slot(entry: Entry) -> int:
    assert entry.slot is not None
    return entry.slot


def _sent(entries: list[Entry], chosen: Tensor) -> Callable[[], Known]:
    """Sends tokens to the host; what is returned waits for them."""
    if chosen.device.type != "cuda":
        return lambda: list(zip(entries, chosen.tolist(), strict=True))
    held = torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True)
    held.copy_(chosen, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(chosen.device))

    def receive() -> Known:
        event.synchronize()
        return list(zip(entries, held.tolist(), strict=True))

    return receive
