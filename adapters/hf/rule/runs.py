"""Short runs of a model whose attention and masks are functions of the run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from .untouched import configs_of

OWN, OURS = "kvpolicy_own", "kvpolicy_probe"  # names of attention and mask functions
PROMPT, STEPS = 11, 1  # tokens


class Run(Protocol):
    """What the attention and mask functions of a run's name call.

    `model` is what runs; `begin` is told the columns that came before a forward.
    """

    @property
    def model(self) -> Any: ...

    def begin(self, past: int) -> None: ...

    def attention(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any
    ) -> Any: ...

    def mask(self, **arguments: Any) -> Any: ...


_LOCK = threading.RLock()
_running: list[Run] = []


def forwards(run: Run, name: str, tokens: Tensor, cache: Any) -> list[Tensor]:
    """Logits of a prompt and of single tokens after it."""
    found = []
    cuts = [(0, PROMPT), *((PROMPT + n, PROMPT + n + 1) for n in range(STEPS))]
    with named(run, name):
        for start, stop in cuts:
            run.begin(start)
            out = run.model(input_ids=tokens[:, start:stop], past_key_values=cache, use_cache=True)
            found.append(logits_of(out))
    return found


def logits_of(out: Any) -> Tensor:
    """A forward's logits, or the last hidden states of a model without a head."""
    logits: Tensor | None = getattr(out, "logits", None)
    found: Tensor = out[0] if logits is None else logits
    return found


@contextlib.contextmanager
def named(run: Run, name: str) -> Iterator[None]:
    """Lets `run` be what the attention and mask functions of `name` call."""
    with _LOCK:
        for config in configs_of(run.model):
            config._attn_implementation = name
        _running.append(run)
        try:
            yield
        finally:
            _running.pop()


def _attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **given: Any
) -> Any:
    return _running[-1].attention(module, query, key, value, attention_mask, **given)


def _mask(**arguments: Any) -> Any:
    return _running[-1].mask(**arguments)


for _name in (OWN, OURS):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
