"""Metrics and the resumable state of one training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import torch

from .controller import KeepController
from .gate import WriteGates


class Run:
    """A folder with `metrics.jsonl` and `state.pt`; without a folder nothing is written.

    Args:
        folder: created if needed.
        main: whether this process writes.
    """

    def __init__(self, folder: str | Path | None, *, main: bool) -> None:
        self._folder = None if folder is None else Path(folder)
        self._main = main
        if self._folder is not None and main:
            self._folder.mkdir(parents=True, exist_ok=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line."""
        if self._folder is not None and self._main:
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")

    def save(
        self,
        step: int,
        gates: WriteGates,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        steer: KeepController | None,
    ) -> None:
        """Replace `state.pt`, in one move."""
        if self._folder is None or not self._main:
            return
        state = {
            "step": step,
            "gates": gates.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "controller": None if steer is None else attrs.asdict(steer),
        }
        partial = self._folder / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self._folder / "state.pt")  # an interrupted save leaves the old state

    def load(
        self,
        gates: WriteGates,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        steer: KeepController | None,
    ) -> int:
        """Restore a saved run and return its step; 0 if there is none."""
        path = None if self._folder is None else self._folder / "state.pt"
        if path is None or not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        gates.load_state_dict(state["gates"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if steer is not None and state["controller"] is not None:
            for name, value in state["controller"].items():
                setattr(steer, name, value)
        return int(state["step"])
