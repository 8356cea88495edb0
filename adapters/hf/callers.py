"""Whose code called a model, for a hook of its forward that asks."""

from __future__ import annotations

import sys

from transformers.generation import logits_process, utils

# Frames between a hook and the call of its module.
_BETWEEN = ("torch.", __name__, f"{__package__}.attach", f"{__package__}.forwards")
# Whose forwards are generate's own: transformers' loops, and ours. Streamers, processors, hooks
# and methods of a model's class may ask the model beside them.
LOOPS = {utils.__name__, f"{__package__}.decode_loop", f"{__package__}.capture"}
LIBRARIES = (f"{__package__}.", "transformers.")
GUIDANCE = logits_process.__name__  # of the unconditional branch


def calling() -> str:
    """The name of the module of that code."""
    frame = sys._getframe(1)
    while (name := str(frame.f_globals.get("__name__"))).startswith(_BETWEEN):
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return name
