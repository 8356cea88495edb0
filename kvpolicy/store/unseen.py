"""What the host knows of a pool's free pages while the device takes some."""

from __future__ import annotations

import torch
from torch import Tensor


class Unseen:
    """Free pages at least, known without waiting for what the device was told last.

    `least` is what was free when the host last looked, less the pages taken since: exact where the
    device has said so, a bound for the write whose number is on its way. None: the host must look.
    """

    def __init__(self) -> None:
        self.least: int | None = None
        self._number: Tensor | None = None  # pages of the last write, once the event has come
        self._event: torch.cuda.Event | None = None
        self._bound = 0

    def forget(self) -> None:
        """Pages were taken or given back in ways that are not followed."""
        self.least, self._number, self._event = None, None, None

    def learn(self, free: int) -> None:
        """So many pages are free."""
        self.forget()
        self.least = free

    def add(self, count: int) -> None:
        """So many pages more."""
        if self.least is not None:
            self.least += count

    def settle(self) -> int | None:
        """`least`, once the last write's number has come: that write lies a layer back."""
        if self.least is not None and self._number is not None:
            if self._event is not None:
                self._event.synchronize()
            self.least += self._bound - int(self._number.sum())
            self._number = self._event = None
        return self.least

    def take(self, bound: int, taken: Tensor) -> None:
        """A write, launched after this, takes `taken.sum()` pages, at most `bound`."""
        assert self.least is not None and self._number is None
        self.least, self._bound = self.least - bound, bound
        self._number = taken.to("cpu", non_blocking=True)
        if taken.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(taken.device))
