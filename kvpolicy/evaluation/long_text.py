"""Next-token loss on long text, over all tokens and over those that only far context gives away."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .prompts import Frame, sentences
from .score import Session

FAR = 512
_CHUNK = 512  # tokens of a forward, whose logits exist at once


def documents(
    tokenizer: PreTrainedTokenizerBase, text: str, *, length: int, contexts: int, seed: int = 0
) -> list[Tensor]:
    """Pieces of `length` tokens from random places in a text."""
    frame, rng = Frame(tokenizer), random.Random(seed)
    return [
        torch.tensor([i for part in sentences(frame, text, length, rng) for i in part])
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
def losses(session: Session, ids: Tensor) -> Tensor:
    """Next-token losses `[N - 1]` in nats of `ids` `[N]`, read as one prompt."""
    found = []
    for begin in range(0, len(ids) - 1, _CHUNK):
        targets = ids[begin + 1 : begin + 1 + _CHUNK]
        # Before the prompt's end a step is a part of the prompt.
        logits = session.step(ids[begin : begin + len(targets)]).float()
        found.append(
            torch.nn.functional.cross_entropy(
                logits, targets.to(logits.device), reduction="none"
            ).cpu()
        )
    return torch.cat(found)
