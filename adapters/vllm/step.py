"""One forward of vLLM's, as rows see it."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from ...ops import Segments


@attrs.frozen(eq=False)
class Prompt:
    """One row's part of a forward that brings it several tokens.

    `first` is where its tokens begin in the batch, `seg` its own segments. `held` are the tokens
    in pages before it, at most, of each layer and KV head. `ends` where the request's prompt ends
    with it and generated tokens follow in the same forward.
    """

    row: int
    first: int
    seg: Segments
    held: Sequence[Sequence[int]]
    ends: bool = False


@attrs.frozen(eq=False)
class Step:
    """The first `decodes` tokens of a batch are one of a row each; then come parts of prompts.

    Tensors of the former are in `Rows`, at the same place in every step, as a captured graph wants
    them.
    """

    decodes: int
    prompts: tuple[Prompt, ...] = ()


def sent(numbers: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers of the host as an int32 tensor on the device; nothing waits for the device.

    Rows are padded to a common length, a multiple of 4, so that each starts at 16 bytes.
    """
    width = -(-max(map(len, numbers), default=0) // 4) * 4
    rows = [[*row, *[0] * (width - len(row))] for row in numbers]
    host = torch.tensor(rows, dtype=torch.int32, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def prompt_of(
    row: int, first: int, start: int, added: int, window: int, held: Sequence[Sequence[int]],
    device: torch.device, *, ends: bool = False,
) -> Prompt:  # fmt: skip
    """The part of a prompt that adds so many tokens to `start` others."""
    kept = min(start, window) + added
    on = sent([(0, added), (0, kept), (start,)], device)
    seg = Segments((0, added), (0, kept), (start,), on[0, :2], on[1, :2], on[2, :1])
    return Prompt(row, first, seg, held, ends)
