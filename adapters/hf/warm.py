"""What first requests would compile, compiled before them by requests of made-up tokens.

What a kernel is compiled for follows from the model, the pipeline and the device; of a request only
padded numbers count: sequences, and what a prompt's length asks of evictions and selections.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import attrs
import torch

from ..._arguments import optional
from ..._fields import MOST, check_int
from ...backend import compilations, resolve
from ...errors import KVPolicyError
from ...eviction import JudgeQ
from .attached import Attached
from .phases import ask, read
from .replay import replay

LENGTH = 8192  # of a prompt, where nothing else is asked for
SHORT = 19  # tokens of a short prompt; dynamo takes sizes for one that happen to be equal
NEW = 5  # tokens: two eager steps, the capture, a replay
CALL = 8192  # tokens of a call of several long prompts
ALIKE = 16  # sequences, from 2 on, whose prompts run the same kernels; a decode step's differ

Say = Callable[[int, int, str], None]


@attrs.frozen(kw_only=True)
class Warmed:
    """What `warm` did: the `kernels` that became ready, each once for each variant, and `seconds`.

    `left_out` are requests that did not run, with the reason; theirs would be refused as well.
    """

    kernels: tuple[str, ...]
    seconds: float
    left_out: tuple[str, ...] = ()


def warm(attachment: Attached, batch: int, length: int | None, say: Say | None) -> Warmed:
    """See `Attachment.warm`."""
    check_int("batch", batch, 1)
    optional(check_int, "length", length, 1, MOST)
    began = time.monotonic()
    requests = _requests(attachment, batch, length or _usual(attachment))
    left_out: list[str] = []
    with compilations() as kernels:
        for number, (said, request) in enumerate(requests):
            if say is not None:
                say(number, len(requests), said)
            try:
                request()
            except (KVPolicyError, torch.OutOfMemoryError) as error:
                left_out.append(f"{said}: {str(error).splitlines()[0]}")
        if say is not None:
            say(len(requests), len(requests), f"{len(kernels)} kernels")
    for rows in [n for n in attachment.idle if n > 1]:
        del attachment.idle[rows]  # a batch's memory; one sequence's graph serves the next one
    return Warmed(
        kernels=tuple(kernels), seconds=time.monotonic() - began, left_out=tuple(left_out)
    )


def _usual(attachment: Attached) -> int:
    """The usual longest prompt, or the model's if it is shorter."""
    limits = [
        getattr(attachment.decoder.config, "max_position_embeddings", None),
        attachment.put_aside,
    ]
    return max(min(LENGTH, *(n - NEW for n in limits if n is not None)), 1)


def _requests(attachment: Attached, batch: int, length: int) -> list[tuple[str, Any]]:
    """Requests that together need every kernel, as what is said of each and what runs it."""

    def whole(rows: int, tokens: int, padded: bool = True) -> tuple[str, Any]:
        said = f"{rows} x {tokens} tokens" + (", padded" if padded and rows > 1 else "")
        return said, lambda: _generate(attachment, _ids(attachment, rows, tokens), padded)

    several = sorted({2**n for n in range(1, batch.bit_length())} | {batch} - {1})

    def alike(tokens: int) -> list[tuple[str, Any]]:
        """One sequence and several, whose columns count alike or not."""
        own = several[:1]
        return [whole(1, tokens), *(whole(n, tokens, p) for n in own for p in (False, True))]

    if resolve(attachment.pipeline.backend, attachment.spec.device) == "reference":
        # Nothing but layers is compiled, for one sequence and for several.
        return [] if attachment.compiled is None else alike(min(SHORT, length))
    window = attachment.pipeline.window
    short, longer = min(SHORT, length), max(min(2 * window + SHORT, length), 2)
    lengths = sorted({min(window, length), longer, length, *_powers(16, length)} - {short})
    found = alike(short) + [whole(1, m) for m in lengths]
    found += [whole(n, short) for n in several[1:]]
    kinds = [n for n in several if n == several[0] or n > ALIKE]
    found += [whole(n, m) for n in kinds for m in sorted({longer, length})]

    if attachment.pipeline.eviction.replayed:
        return found

    def parts(rows: int, tokens: int) -> None:
        _generate(attachment, _ids(attachment, rows, tokens), False, -(-tokens // 2))

    cut = [
        (1, longer),
        *((n, m) for n in several[:1] for m in (max(min(window, length), 2), longer)),
    ]
    found += [(f"{n} x {m} tokens in parts", partial(parts, n, m)) for n, m in cut]
    found.append(("turns and questions", lambda: _ask(attachment, _ids(attachment, 1, longer))))
    return found


def _powers(least: int, most: int) -> Iterator[int]:
    while least <= most:
        yield least
        least *= 2


def _ids(attachment: Attached, rows: int, tokens: int) -> torch.Tensor:
    """Made-up tokens `[rows, tokens]`; special ones mostly come last in a vocabulary."""
    vocabulary = attachment.base.config.get_text_config(decoder=True).vocab_size
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(vocabulary, 256), (rows, tokens), generator=rng)
    return ids.to(attachment.base.device)


def _generate(
    attachment: Attached, ids: torch.Tensor, padded: bool, part: int | None = None
) -> None:
    rows, tokens = ids.shape
    if attachment.pipeline.eviction.replayed:
        _look_back(attachment, ids)
        return
    mask = torch.ones_like(ids)
    if padded:
        mask[1:, : tokens // 2] = 0
    if part is None and rows > 1 and rows * tokens > CALL and _cut(attachment):
        part = max(CALL // rows, 1)
    more = {} if part is None else {"prefill_chunk_size": part}
    attachment.model.generate(input_ids=ids, attention_mask=mask, **_options(), **more)


def _look_back(attachment: Attached, ids: torch.Tensor) -> None:
    """Prompts whose tokens, or made-up ones, look back before they end, and a question."""
    cache, eviction = attachment.cache_for(None), attachment.pipeline.eviction
    with torch.no_grad():
        cache.begin_prompt()
        attachment.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        if isinstance(eviction, JudgeQ):
            embeds = eviction.embeds_for(len(ids)).to(ids.device, attachment.base.dtype)
            replay(attachment, cache, None, embeds, None, None, 0)
        else:
            replay(attachment, cache, ids, None, None, None, 4)
        cache.end_prompt()
    ask(attachment, cache, ids[:, :SHORT], None, "decode", _options())


def _cut(attachment: Attached) -> bool:
    """Whether prompts may come in parts."""
    probe, selection = attachment.served.probe, attachment.pipeline.selection
    return probe.goes_on and not selection.whole_prompt


def _ask(attachment: Attached, ids: torch.Tensor) -> None:
    """Two questions about one context, then another turn of it.

    Sequences that share pages write beside them, and tokens may have been dropped.
    """
    cache = read(attachment, ids, None, None, None, None)
    question = ids[:, :SHORT].expand(2, -1)
    ask(attachment, cache, question, None, "decode", _options())
    read(attachment, ids, None, None, cache, None)


def _options() -> dict[str, Any]:
    """Of greedy decoding of NEW tokens, whatever the model's own config says."""
    return {
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "min_new_tokens": NEW,
        "max_new_tokens": NEW,
        "return_dict_in_generate": False,
    }


def line(done: int, of: int, said: str) -> None:
    """A line on stderr that says how far it is: one that is overwritten on a terminal."""
    text = f"kvpolicy warms kernels: {done} of {of}, {said}"
    if sys.stderr.isatty():
        print(f"\r{text:<78}", end="\n" if done == of else "", file=sys.stderr, flush=True)
    elif done in (0, of):
        print(text, file=sys.stderr, flush=True)
