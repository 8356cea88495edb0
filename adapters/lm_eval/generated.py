"""generate_until through many requests: rows of a padded batch, served in slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hf import Attachment, Finished, Request

Stop = Callable[[Tensor, None], Any]


def generated(
    attached: Attachment,
    context: Tensor,
    mask: Tensor,
    new: int,
    slots: int,
    stops: Callable[[], Iterable[Stop]],
    done: Callable[[Finished], None],
    options: dict[str, Any],
) -> Tensor:
    """`context` `[B, S]`, padded as `mask` says, and up to `new` tokens of each row.

    `stops` makes one row's criteria, which see its new tokens `[1, N]`. `done` is called with each
    row; one that failed raises its error. A row's draws depend on its place in the batch.
    """
    requests = [
        _request(number, row[real.bool()].tolist(), new, list(stops()), options)
        for number, (row, real) in enumerate(zip(context.cpu(), mask.cpu(), strict=True))
    ]
    said: dict[Any, list[int]] = {}
    for finished in attached.generate_many(requests, slots=slots):
        if finished.error is not None:
            raise finished.error
        said[finished.id] = finished.tokens
        done(finished)
    width = max(map(len, said.values()))
    pad = options.get("pad_token_id") or 0
    rows = [[*said[n], *[pad] * (width - len(said[n]))] for n in range(len(requests))]
    return torch.cat([context, torch.tensor(rows, device=context.device)], 1)


def _request(
    number: int, ids: list[int], new: int, stops: Sequence[Stop], options: dict[str, Any]
) -> Request:
    tokens: list[int] = []

    def hear(token: int) -> None:
        tokens.append(token)
        seen = torch.tensor([tokens])
        if any([bool(stop(seen, None)) for stop in stops]):
            request.cancel()

    request = Request(ids, id=number, seed=number, on_token=hear, max_new_tokens=new, **options)
    return request
