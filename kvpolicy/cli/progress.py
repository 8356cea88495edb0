"""How far a training is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import typer

LINES = 20  # of a training that does not run on a terminal


class StepProgress:
    """Shows loss, kept fraction and time left; called with the metrics of each step.

    Args:
        steps: of the whole training.
        shown: whether this process shows anything.
    """

    def __init__(self, steps: int, *, shown: bool = True) -> None:
        self.steps, self.shown = steps, shown
        self.terminal = shown and sys.stderr.isatty()
        self.stack = ExitStack()
        self.bar: Any = None
        self.began, self.first = time.monotonic(), 0  # steps that an earlier run made

    def __enter__(self) -> StepProgress:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as Left

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), Left())
            self.bar = self.stack.enter_context(Progress(*columns, console=Console(stderr=True)))
            self.bar.add_task("", total=self.steps)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stack.__exit__(kind, error, trace)

    def __call__(self, metrics: dict[str, Any]) -> None:
        if not self.shown:
            return
        step, said = metrics["step"], described(metrics)
        if self.bar is not None:
            self.bar.update(0, completed=step, description=said)
            return
        if not self.first:
            self.first, self.began = step, time.monotonic()
        every = max(self.steps // LINES, 1)
        if step % every and step != self.steps:
            return
        done = step - self.first
        left = (time.monotonic() - self.began) / done * (self.steps - step) if done else None
        rest = "" if left is None or step == self.steps else f", {span(left)} left"
        typer.echo(f"step {step} of {self.steps}: {said}{rest}", err=True)


def described(metrics: dict[str, Any]) -> str:
    """Loss and kept fraction (or mean head weight) in words."""
    said = f"loss {metrics['loss']:.4g}"
    if "keep" in metrics:
        said += f", {metrics['keep']:.1%} kept"
    if "heads" in metrics:
        said += f", mean head weight {metrics['heads']:.3f}"
    return said


def span(seconds: float) -> str:
    """A duration in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
