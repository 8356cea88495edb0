"""Steers the regulariser's weight so that the cache reaches a wanted size."""

from __future__ import annotations

import math
from typing import Any

import attrs

from .._fields import fraction


@attrs.define(kw_only=True)
class KeepController:
    """A proportional-integral controller of ln(lambda) on ln(keep / target).

    Args:
        target: wanted fraction of tokens in the cache, the window included, in (0, 1).
        integral: gain per step. The kept fraction falls about as lambda ** -0.5 and answers
            within some 50 steps, so 0.02 settles without ringing.
        proportional: gain of the present error.
        smoothing: share of the past in the running mean of the kept fraction.
        log_lam: integral state, ln(lambda) at zero error; starts at the published default 0.16.
        keep: running mean of the kept fraction, None before the first update.
    """

    target: float = attrs.field(validator=fraction(low_open=True, high_open=True))
    integral: float = 0.02
    proportional: float = 0.5
    smoothing: float = 0.9
    log_lam: float = math.log(0.16)
    keep: float | None = None

    @property
    def error(self) -> float:
        """ln(keep / target), bounded so that the untrained start does not wind lambda up."""
        if self.keep is None:
            return 0.0
        return min(max(math.log(self.keep / self.target), -1.0), 1.0)

    @property
    def lam(self) -> float:
        """Weight of the regulariser for the next step."""
        return math.exp(self.log_lam + self.proportional * self.error)

    def update(self, keep: float) -> None:
        """Take in the kept fraction of a step."""
        old = keep if self.keep is None else self.keep
        self.keep = self.smoothing * old + (1 - self.smoothing) * keep
        self.log_lam = min(max(self.log_lam + self.integral * self.error, -10.0), 6.0)

    def state_dict(self) -> dict[str, Any]:
        """All numbers, for a resumable run."""
        return attrs.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict; raises ValueError for other names or values."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"wanted {', '.join(self.state_dict())}, got {', '.join(state)}")
        for name, value in state.items():
            if not isinstance(value, float | int) and not (name == "keep" and value is None):
                raise ValueError(f"{name}: wanted a number, got {value!r}")
        for name, value in state.items():
            setattr(self, name, value)
