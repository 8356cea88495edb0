"""Whose code called a model, for a hook of its forward that asks."""

from __future__ import annotations

import sys

from transformers.generation import logits_process, utils

# Frames between a hook and the call of its module, or of a model of the library around that.
_BETWEEN = (
    "torch.", "transformers.models.", __name__, f"{__package__}.attach", f"{__package__}.forwards",
)  # fmt: skip
LIBRARIES = (f"{__package__}.", "transformers.")
GENERATION = utils.__name__
GUIDANCE = logits_process.__name__  # of the unconditional branch


def loops(name: str) -> bool:
    """Whether forwards of that module's code are generate's own: of transformers' loops, or ours.

    Streamers, processors, hooks and methods of a model's class may ask the model beside them.
    """
    return name == GENERATION or name.startswith(f"{__package__}.")


def calling() -> str:
    """The name of the module of that code."""
    frame = sys._getframe(1)
    while (name := str(frame.f_globals.get("__name__"))).startswith(_BETWEEN):
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return name
