"""Gates that differ in one setting, each measured at several thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ...admission import WriteGate
from ...pipeline import CachePipeline
from ..chart import Chart, Point
from ..finished import Part
from .lab import ASKED, Lab

HELD, LOSS = "cache held, window included", "next-token loss, nats"
RIGHT = f"{ASKED}: answer tokens right"
TAU_NOTE = "Points of a curve are thresholds tau; a gate is trained and published with 0.1."


def by_lambda(lab: Lab) -> list[Chart]:
    """The weight of the regulariser, and the threshold on the front that it makes."""
    made = {f"lambda {x:g}": {"lam": x} for x in lab.recipe.lambdas}
    return _charts(lab, "lambda and tau", made)


def by_window(lab: Lab) -> list[Chart]:
    """The local window; of one token there is no grace period."""
    made = {f"window {x}": {"window": x} for x in lab.recipe.windows}
    return _charts(lab, "the local window", made)


def by_width(lab: Lab) -> list[Chart]:
    """Hidden units of the gate, in head_dim."""
    made = {f"{x:g} x head_dim": {"expand": x} for x in lab.recipe.widths}
    return _charts(lab, "the gate's width", made)


def by_inputs(lab: Lab) -> list[Chart]:
    """Which keys the gate reads."""
    names = {"both": "both keys", "pre": "key before RoPE", "post": "key after RoPE"}
    return _charts(lab, "the gate's inputs", {v: {"inputs": k} for k, v in names.items()})


def over_taus(lab: Lab, curve: str, gate: WriteGate, kind: str = "") -> list[tuple[str, Part]]:
    """A gate at every threshold of the recipe: names of points and what was measured."""
    return [
        (
            f"tau {tau:g}",
            lab.measured(
                f"{curve} tau {tau:g}", CachePipeline(admission=attrs.evolve(gate, threshold=tau)),
                kind,
            ),
        )
        for tau in lab.recipe.taus
    ]  # fmt: skip


def charts_of(
    title: str, rows: Sequence[tuple[str, str, Part]], notes: Sequence[str] = ()
) -> list[Chart]:
    """Loss and accuracy over the cache held; a row is a curve, a point's name, and its numbers."""
    found = []
    for y, name, held in ((LOSS, "loss", "held"), (RIGHT, "accuracy", "held_asked")):
        points = [
            Point(curve=curve, name=point, x=of[held], y=of[name],
                  error=number(of[f"{name}_error"]), more=_more(name, of))
            for curve, point, of in rows
            if of.get(name) is not None
        ]  # fmt: skip
        if points:
            found.append(Chart(title=title, x=HELD, y=y, points=points, notes=notes))
    return found


def full(lab: Lab, kind: str = "") -> tuple[str, str, Part]:
    """The row of full attention."""
    window = lab.recipe.training.window
    return "full", "full attention", lab.measured("full", CachePipeline(window=window), kind)


def number(value: float | None) -> float:
    """NaN for what JSON keeps as null."""
    return math.nan if value is None else value


def _charts(lab: Lab, title: str, made: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    rows = [full(lab)]
    for curve, changes in made.items():
        plain = all(getattr(lab.recipe.training, k) == v for k, v in changes.items())
        name = "base" if plain else curve.replace(" ", "-")
        gate = lab.gate(name, **({} if plain else changes))
        rows += [(curve, point, of) for point, of in over_taus(lab, name, gate)]
    return charts_of(title, rows, (TAU_NOTE,))


def _more(name: str, of: Part) -> dict[str, float]:
    return {"hit tokens": number(of["hit_loss"])} if name == "loss" else {}
