"""What ranks that share a model decide of each step, so that all decode the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .ranks import Ranks

Result = TypeVar("Result")


class Lockstep:
    """Hands on what rank 0 decides.

    Between captured steps nobody waits for the device, and a rank whose own code fails there goes
    on with the others: they learn of it with the token, and raise where the host next looks. Else
    they vote at once.
    """

    def __init__(self, ranks: Ranks, *, waits: bool) -> None:
        self.ranks = ranks
        self.late = ranks.many and not waits
        self.error: BaseException | None = None  # of this rank, until all know of it

    def decide(self, own: Callable[[], tuple[Tensor, Tensor]], batch: int) -> tuple[Tensor, Tensor]:
        """Tokens `[B]` and which sequences go on, bool `[B]`: rank 0's `own()`."""
        if not self.ranks.many:
            return own()
        if not self.late:
            token, alive = self.ranks.same(torch.stack(own()))
            return token, alive.bool()
        found = self.kept(lambda: torch.stack(own()))
        if found is None:
            found = torch.zeros(2, batch, dtype=torch.int64, device=self.ranks.mesh.device_type)
        told = self.ranks.step(found.flatten(), self.error)
        self.code = told[-1:]
        token, alive = told[:-1].view(2, batch)
        return token, alive.bool()

    def kept(self, call: Callable[[], Result]) -> Result | None:
        """What `call` gives; None where this rank failed, of which the others are told later."""
        if self.error is not None:
            return None
        try:
            return call()
        except Exception as error:
            if not self.late:
                raise
            self.error = error
            return None

    def flags(self, alive: Tensor) -> Tensor:
        """What the host reads of a step: whether a sequence goes on, and the code of a failure."""
        on = alive.any()[None]
        return torch.cat([on.long(), self.code]) if self.late else on

    def look(self, flags: list[int]) -> bool:
        """Whether a sequence went on, of the flags of a step; raises on all ranks if one failed."""
        on, *code = flags
        for failure in code:
            self.ranks.raise_told(failure, self._taken(failure))
        return bool(on)

    def end(self) -> None:
        """Raises if a rank failed since."""
        if self.late:
            self.ranks.stepping = False
            self.ranks.vote(self._taken())

    def _taken(self, told: int = 1) -> BaseException | None:
        """This rank's error once all are `told`; its traceback holds this object, not it that."""
        if not told:
            return None
        error, self.error = self.error, None
        return error
