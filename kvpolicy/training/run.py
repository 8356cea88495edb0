"""Metrics, the resumable state and the processes of one training run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from .._files import read_pt, write_pt, write_text

Progress = Callable[[dict[str, Any]], None]  # called with the metrics of a step
_WORDS = {int: "a number of steps", dict: "a dict"}


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
        write_pt(self._folder / "state.pt", state)

    def load(self) -> tuple[int, dict[str, float]]:
        """Restore a saved run; its step (0 if there is none) and what `save` was given more.

        Metrics of steps that were not saved are dropped: they are made again.

        Raises:
            ValueError: the state was made with other settings, or a file is damaged.
        """
        if self._folder is None:
            return 0, {}
        path = self._folder / "state.pt"
        if not path.exists():
            self._truncate(0)
            return 0, {}
        state = read_pt(path)
        self._check(state, path)
        for name, part in self._parts.items():
            try:
                part.load_state_dict(state[name])
            except Exception as error:  # torch and optimisers raise whatever they meet first
                raise ValueError(
                    f"{path}: {name}: wanted one that fits this run, got {error}"
                ) from error
        self._truncate(state["step"])
        return state["step"], state["more"]

    def _check(self, state: Any, path: Path) -> None:
        """Raises ValueError unless `state` is what `save` writes, with this run's settings."""
        kinds = {"step": int, "settings": dict, "more": dict} | dict.fromkeys(self._parts, dict)
        if not isinstance(state, dict):
            raise ValueError(f"{path}: wanted the state of a run, got {type(state).__name__}")
        for name, kind in kinds.items():
            if not isinstance(state.get(name), kind) or (kind is int and state[name] < 0):
                found = type(state[name]).__name__ if name in state else "no such key"
                raise ValueError(f"{path}: {name}: wanted {_WORDS[kind]}, got {found}")
        found = state["settings"]
        # A setting that an older version did not note down is taken as the same.
        other = [n for n, value in self._settings.items() if found.get(n, value) != value]
        if other:
            raise ValueError(
                f"out_dir: {self._folder} holds a run of another {', '.join(other)}: "
                f"{', '.join(repr(found.get(name)) for name in other)}"
            )

    def _truncate(self, step: int) -> None:
        assert self._folder is not None
        path = self._folder / "metrics.jsonl"
        if not self._main or not path.exists():
            return
        # A kill may leave half a line.
        lines = [x for x in path.read_text(encoding="utf-8").split("\n")[:-1]]
        kept = [line for n, line in enumerate(lines, 1) if _step_of(line, n, path) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str, number: int, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: line {number}: wanted the metrics of a step") from error


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
