"""The command `kvpolicy`: planning memory, training, evaluation, benchmarks."""

from __future__ import annotations

import typer

from .bench import bench
from .calibrate import calibrate, pareto
from .evaluate import evaluate
from .inspect import inspect
from .models import models
from .plan import plan
from .train import train_duo, train_gate

app = typer.Typer(
    help="KV-cache admission, selection and eviction policies that compose and free real memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (plan, train_gate, train_duo, calibrate, pareto, evaluate, inspect, models, bench):
    app.command()(command)
