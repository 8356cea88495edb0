"""What the host knows of a pool's free pages while the device takes some."""

from __future__ import annotations

import torch
from torch import Tensor


class FreePages:
    """Free pages at least, known without waiting for what the device was told last.

    `least` is what was free when the host last looked, less what prompts have taken since: exact
    where the device has said so, a bound for the write whose numbers are on their way. Pages that
    decoding takes are not followed. They are among those reserved for its cache, so that `least`
    less all that is reserved stays right: who reserves anew forgets. None: the host
    must look.
    """

    def __init__(self) -> None:
        self.least: int | None = None
        self._numbers: Tensor | None = None  # of the last write, once the event has come
        self._event: torch.cuda.Event | None = None
        self._bound = 0

    def forget(self) -> None:
        """Pages were taken, given back or reserved in ways that are not followed."""
        self.least, self._numbers, self._event = None, None, None

    def learn(self, free: int) -> None:
        """So many pages are free."""
        self.forget()
        self.least = free

    def add(self, count: int) -> None:
        """So many pages more."""
        if self.least is not None:
            self.least += count

    def settle(self) -> int | None:
        """`least`, once the last write's numbers have come: that write lies a layer back."""
        if self.least is not None and self._numbers is not None:
            if self._event is not None:
                self._event.synchronize()
            free, *taken = self._numbers.tolist()
            if sum(taken) > free:
                raise RuntimeError(f"a prompt took {sum(taken)} pages where {free} were free")
            self.least += self._bound - sum(taken)
            self._numbers = self._event = None
        return self.least

    def take(self, bound: int, taken: Tensor, top: Tensor) -> None:
        """A write, launched after this, takes `taken.sum()` of `top` pages, at most `bound`."""
        assert self.least is not None and self._numbers is None
        self.least, self._bound = self.least - bound, bound
        self._numbers = torch.cat([top.view(1), taken.flatten()]).to("cpu", non_blocking=True)
        if taken.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(taken.device))
