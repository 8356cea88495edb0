"""How far long work is: a bar on a terminal, now and then a line elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Annotated, Any, Self

import typer

LINES = 20  # of work that does not run on a terminal

Asked = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="On stderr; default: on a terminal."),
]
AskedLines = Annotated[
    bool | None,
    typer.Option("--progress/--no-progress", help="On stderr; elsewhere than on a terminal lines."),
]


class Progress:
    """What work does, how much of it is done and the time left.

    Args:
        of: what is counted, such as "step".
        asked: whether anything is shown; by default on a terminal, and with `lines` elsewhere too.
        lines: whether work that runs elsewhere writes lines without being asked.
    """

    def __init__(self, of: str, *, asked: bool | None = None, lines: bool = False) -> None:
        self.of = of
        terminal = sys.stderr.isatty()
        self.shown = (terminal or lines) if asked is None else asked
        self.terminal = self.shown and terminal
        self.stack = ExitStack()
        self.bar: Any = None
        self.steps = self.first = 0  # `first`: steps that an earlier run made
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as Left

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), Left())
            # What is printed meanwhile goes above the bar, unless it goes into a file.
            shared = sys.stdout.isatty()
            bar = Progress(*columns, console=Console(stderr=True), redirect_stdout=shared)
            self.bar = self.stack.enter_context(bar)
            self.bar.add_task("", total=None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stack.__exit__(kind, error, trace)

    def begin(self, steps: int, first: int = 0) -> None:
        """Work of so many steps begins; `first` of them an earlier run made."""
        self.steps, self.first, self.began = steps, first, time.monotonic()
        if self.bar is not None:
            self.bar.reset(0, total=steps, completed=first)

    def doing(self, said: str) -> None:
        """What is done from now on."""
        if self.bar is not None:
            self.bar.update(0, description=said)
        elif self.shown and not self.steps:
            typer.echo(said, err=True)

    def done(self, steps: int, said: str) -> None:
        """So many steps are done; `said` is of the last one."""
        if self.bar is not None:
            self.bar.update(0, completed=steps, description=said)
            return
        every = max(self.steps // LINES, 1)
        if not self.shown or (steps % every and steps != self.steps):
            return
        here = steps - self.first
        left = (time.monotonic() - self.began) / here * (self.steps - steps) if here else None
        rest = "" if left is None or steps == self.steps else f", {span(left)} left"
        typer.echo(f"{self.of} {steps} of {self.steps}: {said}{rest}", err=True)


class StepProgress(Progress):
    """That of a training; `step` takes the metrics of each step.

    Args:
        steps: of the whole training.
        asked: whether anything is shown; by default it is, as lines where there is no terminal.
        shown: whether this process shows anything.
    """

    def __init__(self, steps: int, *, asked: bool | None = None, shown: bool = True) -> None:
        super().__init__("step", asked=asked if shown else False, lines=True)
        self.wanted, self.started = steps, False

    def step(self, metrics: dict[str, Any]) -> None:
        """Shows the metrics of a step."""
        step = metrics["step"]
        if not self.started:  # the first step counts for no time: it compiles
            self.started = True
            self.begin(self.wanted, step)
        self.done(step, described(metrics))


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
