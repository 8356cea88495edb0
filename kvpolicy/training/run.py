"""Metrics, the resumable state and the processes of one training run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn


class Stateful(Protocol):
    """What can be saved and restored."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Run:
    """A folder with `metrics.jsonl` and `state.pt`; without a folder nothing is written.

    Args:
        folder: created if needed.
        main: whether this process writes.
        settings: what a state must have been made with to be restored.
        parts: what a state holds, by name.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        main: bool,
        settings: dict[str, Any],
        parts: Mapping[str, Stateful],
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._main, self._settings, self._parts = main, settings, parts
        if self._folder is not None and main:
            self._folder.mkdir(parents=True, exist_ok=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line."""
        if self._folder is not None and self._main:
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")

    def save(self, step: int, **more: float) -> None:
        """Replace `state.pt`, in one move."""
        if self._folder is None or not self._main:
            return
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"step": step, "settings": self._settings, "more": more}
        partial = self._folder / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self._folder / "state.pt")  # an interrupted save leaves the old state

    def load(self) -> tuple[int, dict[str, float]]:
        """Restore a saved run; its step (0 if there is none) and what `save` was given more.

        Metrics of steps that were not saved are dropped: they are made again.

        Raises:
            ValueError: the state was made with other settings.
        """
        if self._folder is None:
            return 0, {}
        path = self._folder / "state.pt"
        if not path.exists():
            self._truncate(0)
            return 0, {}
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["settings"]
        other = [name for name, value in self._settings.items() if found.get(name) != value]
        if other:
            raise ValueError(
                f"out_dir: {self._folder} holds a run of another {', '.join(other)}: "
                f"{', '.join(repr(found.get(name)) for name in other)}"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._truncate(state["step"])
        return int(state["step"]), state["more"]

    def _truncate(self, step: int) -> None:
        assert self._folder is not None
        path = self._folder / "metrics.jsonl"
        if not self._main or not path.exists():
            return
        # A kill may leave half a line.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over processes.

    What is trained is called inside the model's layers, so that DDP's wrapper does not fit; one
    reduction of all gradients (a few MB) does the same.
    """
    if accelerator.num_processes == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat: Any = accelerator.reduce(torch.cat([g.flatten() for g in grads]), "mean")
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
