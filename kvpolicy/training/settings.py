"""What a training of write gates is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from .._fields import fraction, not_negative, number, one_of, positive
from .data import MIXES
from .gate import Inputs
from .objective import Kernel

_POSITIVE = number("a number above 0", lambda x: x > 0)
_NOT_NEGATIVE = number("a number of at least 0", lambda x: x >= 0)


def _lengths(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _check_lengths(instance: Any, attribute: Any, value: tuple[int, ...]) -> None:
    if not value or not all(isinstance(n, int) and n >= 2 for n in value):
        raise ValueError(f"length: wanted one or more, each at least 2, got {list(value)}")


@attrs.frozen(kw_only=True)
class GateTraining:
    """How write gates are trained; every value is checked when this is made.

    Exactly one of `target_keep` and `lam` says how much is kept.

    Args:
        steps: optimiser steps.
        window: tokens of the local window W.
        target_keep: wanted fraction of tokens in the cache, window included; steers lambda.
        lam: a fixed lambda instead.
        length: tokens of a training sequence, for documents; several take turns.
        batch_size: sequences a step and process, of the longest length; about as many tokens
            of others.
        threshold: of the hard decision, for the kept fraction and evaluation.
        expand: hidden units of the gate per channel of a head.
        inputs: "both" keys, that before RoPE ("pre") or that after it ("post"); weights of the one
            that is left out are 0.
        lr: peak learning rate.
        mix: "default" sequences, or those for "recall": more people in places, and tables that
            fill a text.
        seed: of initialisation and data.
        start_lam: first lambda when steered.
        ungated: random positions of each head that are open in a step (published, default 0).
        answer_share: part in [0, 1) of the loss that is the error where answers are predicted
            (ours; the published loss has 0).
        kernel: attention kernel of the student, see gated_attention.
        checkpointing: recompute activations layer by layer.
        eval_every: steps between hard evaluations on held-out batches; 0 for none.

    Example:
        >>> GateTraining(steps=1500, target_keep=0.25).threshold
        0.1
    """

    steps: int = attrs.field(validator=positive)
    window: int = attrs.field(default=64, validator=positive)
    target_keep: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(fraction(low_open=True, high_open=True))
    )
    lam: float | None = attrs.field(
        default=None, validator=attrs.validators.optional(_NOT_NEGATIVE)
    )
    length: tuple[int, ...] = attrs.field(
        default=(4096,), converter=_lengths, validator=_check_lengths
    )
    batch_size: int = attrs.field(default=2, validator=positive)
    threshold: float = attrs.field(default=0.1, validator=fraction())
    expand: float = attrs.field(default=4.0, validator=_POSITIVE)
    inputs: Inputs = attrs.field(default="both", validator=one_of("both", "pre", "post"))
    lr: float = attrs.field(default=1e-3, validator=_POSITIVE)
    mix: str = attrs.field(default="default", validator=one_of(*MIXES))
    seed: int = attrs.field(default=0, validator=attrs.validators.instance_of(int))
    start_lam: float = attrs.field(default=0.16, validator=_POSITIVE)
    ungated: int = attrs.field(default=0, validator=not_negative)
    answer_share: float = attrs.field(default=0.0, validator=fraction(high_open=True))
    kernel: Kernel = attrs.field(default="auto", validator=one_of("auto", "dense", "flex", "flash"))
    checkpointing: bool = attrs.field(default=True, validator=attrs.validators.instance_of(bool))
    eval_every: int = attrs.field(default=0, validator=not_negative)

    def __attrs_post_init__(self) -> None:
        if (self.target_keep is None) == (self.lam is None):
            raise ValueError(
                f"target_keep, lam: wanted exactly one, got {self.target_keep} and {self.lam}; "
                "write target_keep=0.25 to keep a quarter"
            )
