"""Next-token loss on long text, over all tokens and over those that only far context gives away."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .prompts import encode, sentences
from .task import Bound, Task

FAR = 512
_LOGITS = {"cpu": 1 << 11, "cuda": 1 << 14}  # tokens of a forward, whose logits exist at once


def documents(
    tokenizer: PreTrainedTokenizerBase, text: str, *, length: int, contexts: int, seed: int = 0
) -> list[Tensor]:
    """Pieces of `length` tokens from random places in a text."""
    rng = random.Random(seed)
    ids = partial(encode, tokenizer)
    return [
        torch.tensor([i for part in sentences(ids, text, length, rng) for i in part])
        for _ in range(contexts)
    ]


def hit_tokens(ids: Tensor, far: int = FAR) -> Tensor:
    """Tokens whose trigram occurred more than `far` tokens ago and not since, bool `[N]`."""
    hits = torch.zeros(len(ids), dtype=torch.bool)
    last: dict[tuple[int, ...], int] = {}
    tokens = ids.tolist()
    for at in range(2, len(tokens)):
        trigram = tuple(tokens[at - 2 : at + 1])
        hits[at] = trigram in last and at - last[trigram] > far
        last[trigram] = at
    return hits


@torch.no_grad()
def losses(forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Next-token losses `[B, N - 1]` in nats of `ids` `[B, N]`, read as one prompt, on the host.

    Args:
        forward: appends tokens `[B, T]` and returns logits `[B, T, vocabulary]`.
        ids: documents of one length, on the model's device.
    """
    step = max(_LOGITS[ids.device.type] // len(ids), 1)
    found = []
    for begin in range(0, ids.shape[1] - 1, step):
        targets = ids[:, begin + 1 : begin + 1 + step]
        logits = forward(ids[:, begin : begin + targets.shape[1]])
        found.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
            ).view_as(targets)
        )
    return torch.cat(found, 1).cpu()


LOSS = Task(
    name="loss",
    make=documents,
    questions=0,
    bounds=(
        Bound(score="loss", part=1.01, most=0.25),
        Bound(score="hit_loss", part=1.05, most=0.25),
    ),
)
