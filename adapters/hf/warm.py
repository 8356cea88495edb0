"""What first requests would compile, compiled before them by requests of made-up tokens.

What a kernel is compiled for follows from the model, the pipeline and the device; of a request only
padded numbers count: sequences, and what a prompt's length asks of evictions and selections.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from ..._arguments import optional
from ..._fields import MOST, check_int
from ...backend import compilations, resolve
from ...errors import CapacityError, UnsupportedError
from .attached import Attached
from .phases import ask, read

LENGTH, BATCH = 8192, 16  # what is warmed where nothing else is asked for
SHORT = 16  # tokens of a short prompt: shorter ones run the same kernels
NEW = 5  # tokens: two eager steps, the capture, a replay
CALL = 8192  # tokens of a call of several long prompts
ALIKE = 16  # sequences up to which a prompt's kernels are the same; a decode step's are not

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
            except (CapacityError, UnsupportedError, torch.OutOfMemoryError) as error:
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

    def whole(rows: int, tokens: int) -> tuple[str, Any]:
        said = f"{rows} x {tokens} tokens"
        return said, lambda: _generate(attachment, _ids(attachment, rows, tokens))

    several = sorted({2**n for n in range(1, batch.bit_length())} | {batch} - {1})
    if resolve(attachment.pipeline.backend, attachment.spec.device) == "reference":
        # Nothing but layers is compiled, for one sequence and for several.
        rows = [1, *several[:1]] if attachment.compiled is not None else []
        return [whole(n, min(SHORT, length)) for n in rows]
    window = attachment.pipeline.window
    lengths = sorted({min(window, SHORT, length), length, *_powers(SHORT, length)})
    shortest = lengths[0]
    found = [whole(1, n) for n in lengths]
    found += [whole(n, shortest) for n in several]
    found += [
        whole(n, tokens)
        for n in several
        if n > ALIKE
        for tokens in sorted({min(window + SHORT, length), length} - {shortest})
    ]
    parts = _ids(attachment, 1, max(min(2 * window + SHORT, length), 2))
    half = -(-parts.shape[1] // 2)
    found.append(("a prompt in parts", lambda: _generate(attachment, parts, half)))
    found.append(("questions on forks", lambda: _ask(attachment, parts)))
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


def _generate(attachment: Attached, ids: torch.Tensor, part: int | None = None) -> None:
    rows, tokens = ids.shape
    if part is None and rows > 1 and rows * tokens > CALL and _cut(attachment):
        part = max(CALL // rows, 1)
    more = {} if part is None else {"prefill_chunk_size": part}
    attachment.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **_options(), **more
    )


def _cut(attachment: Attached) -> bool:
    """Whether prompts may come in parts."""
    probe, selection = attachment.served.probe, attachment.pipeline.selection
    return probe.goes_on and not selection.whole_prompt


def _ask(attachment: Attached, ids: torch.Tensor) -> None:
    """Two questions about one context: sequences that share pages write beside them."""
    cache = read(attachment, ids, None, None, None, None)
    question = ids[:, :SHORT].expand(2, -1)
    ask(attachment, cache, question, None, "decode", _options())


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
