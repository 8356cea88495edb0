"""generate_many: what it checks, the memory it takes, and the iterator that it gives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...._arguments import optional, wrong
from ...._fields import MOST_INT, check_int
from ....errors import UnsupportedError
from ....spec import CacheSpec
from ..attached import Attached
from .engine import Engine
from .options import Reader
from .requests import Finished, Request
from .room import Room
from .served import check_served, expected_new

SHARE = 0.8  # of a GPU's free memory that pages may take where no cap is given


def serve(
    attachment: Attached,
    requests: Iterable[Request | None],
    slots: int,
    tokens_per_call: int,
    shared_prefix: str | Tensor | Sequence[int] | None,
    max_bytes: int | None,
    tokenizer: Any,
) -> Iterator[Finished]:
    """See `generate_many`; everything is checked before this returns."""
    check_int("slots", slots, 1)
    check_int("tokens_per_call", tokens_per_call, 1)
    optional(check_int, "max_bytes", max_bytes, 1, MOST_INT)
    if isinstance(requests, str | Request) or not isinstance(requests, Iterable):
        hint = "write [request]" if isinstance(requests, Request) else ""
        hint = f"write [Request({requests!r})]" if isinstance(requests, str) else hint
        raise TypeError(wrong("requests", "an iterable of Request objects", requests, hint))
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        hint = f"write AutoTokenizer.from_pretrained({tokenizer!r})"
        hint = hint if isinstance(tokenizer, str) else ""
        raise TypeError(wrong("tokenizer", "a tokenizer of transformers", tokenizer, hint))
    check_served(attachment)
    reader = Reader(attachment, tokenizer)
    prefix = [] if shared_prefix is None else reader.ids("shared_prefix", shared_prefix)
    if prefix and attachment.pipeline.selection.whole_prompt:
        raise UnsupportedError(
            "shared_prefix: the selection decides by a prompt's last queries what all of it reads"
        )
    if prefix and attachment.served.probe.own and not attachment.served.probe.goes_on:
        raise UnsupportedError("shared_prefix: the model takes a prompt in one forward")
    tile = attachment.pipeline.selection.tile or 1
    prefix = prefix[: len(prefix) // tile * tile]
    longest = 1
    if isinstance(requests, Collection):
        read = map(reader.options, requests)
        both = ((len(one.ids), one.most) for one in read)
        longest = max((n + expected_new(attachment, n, most) for n, most in both), default=1)
    sizes = dict(attachment.sizes)
    if max_bytes is not None:
        sizes["max_bytes"] = max_bytes
    elif sizes.get("max_bytes") is None:
        sizes["max_bytes"] = _spare(attachment.spec)
    return _run(attachment, requests, slots, tokens_per_call, prefix, sizes, reader, longest)


def _run(
    attachment: Attached,
    requests: Iterable[Request | None],
    slots: int,
    tokens: int,
    prefix: Sequence[int],
    sizes: dict[str, Any],
    reader: Reader,
    longest: int,
) -> Iterator[Finished]:
    room = Room(attachment, slots, sizes)
    room.state.widen(longest)  # once, and not in steps, each of which a graph is captured for
    engine = Engine(attachment, requests, room, tokens, prefix, reader)
    try:
        yield from engine.run()
    finally:
        engine.close()


def _spare(spec: CacheSpec) -> int | None:
    """Bytes that pages may take of what GPUs have free; None where memory is the host's.

    Of several, the one that is full first decides, since each takes its layers' part.
    """
    parts: dict[torch.device, int] = {}
    for (device, *_), width in spec.token_widths.items():
        parts[device] = parts.get(device, 0) + width
    total = sum(parts.values())
    spare = [
        _free(device) * total // part for device, part in parts.items() if device.type == "cuda"
    ]
    return min(spare, default=None)


def _free(device: torch.device) -> int:
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(SHARE * (free + unused))
