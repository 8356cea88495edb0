from __future__ import annotations

from collections.abc import Callable

import pytest

from kvpolicy.training.controller import KeepController


def _settle(controller: KeepController, plant: Callable[[float], float], steps: int) -> float:
    keep = 1.0
    for _ in range(steps):
        keep += (plant(controller.lam) - keep) / 40  # gates answer with a lag
        controller.update(keep)
    return keep


@pytest.mark.parametrize("target", [0.25, 0.18, 0.10])
@pytest.mark.parametrize("sensitivity", [0.3, 0.5, 0.8])
def test_controller_reaches_the_target(target: float, sensitivity: float) -> None:
    def plant(lam: float) -> float:  # published sweep: 0.24 at 0.16, halved by 4 x lambda
        return min(1.0, 0.24 * (lam / 0.16) ** -sensitivity)

    assert _settle(KeepController(target=target), plant, 800) == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("target", [0.0, 1.0, 25])
def test_controller_wants_a_fraction(target: float) -> None:
    with pytest.raises(ValueError, match=r"target: wanted a number in \(0, 1\), got"):
        KeepController(target=target)
