"""The options of one request: merged as generate merges them, honoured or refused by name."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers.generation import GenerationConfig, LogitsProcessorList, StopStringCriteria

from ...._arguments import check_ids, wrong
from ...._fields import shown
from ....errors import UnsupportedError
from ..arguments import asked_by, check_generate
from ..attached import Attached
from ..generate import merged_config
from ..lengths import whole
from ..planned import OWN_LOOP
from .requests import Request

BESIDE = ("generation_config", "logits_processor", "prefix_allowed_tokens_fn")
DEFAULT = 20  # new tokens, as generate's
STOPS = 16  # criteria of stop strings that are kept, each with a table of the vocabulary
# Fields that ask for what a finished request does not have, by the value that does not.
REFUSED = {
    "num_return_sequences": (1, "give the request several times, with other seeds"),
    "guidance_scale": (1, "its unconditional branch is a sequence of its own"),
    "token_healing": (False, "heal prompts beforehand"),
    "prefill_chunk_size": (None, "prompts are cut by tokens_per_call"),
    "max_time": (None, "cancel the request instead"),
    "return_dict_in_generate": (False, "finished requests hold tokens only"),
    "output_scores": (False, "finished requests hold tokens only"),
    "output_logits": (False, "finished requests hold tokens only"),
    "output_hidden_states": (False, "finished requests hold tokens only"),
}


@attrs.define(eq=False)
class Options:
    """What a request asks for.

    `ids` are the prompt's, `most` the new tokens at most, `ends` the tokens that end it. Its
    `processors` are transformers' own; `stops` looks for stop strings.
    """

    ids: list[int]
    most: int
    sample: bool
    ends: frozenset[int]
    processors: LogitsProcessorList
    stops: StopStringCriteria | None


class Reader:
    """Reads requests for one attachment, with its user's tokenizer."""

    def __init__(self, attachment: Attached, tokenizer: Any) -> None:
        self.attachment, self.tokenizer = attachment, tokenizer
        self.stops: dict[tuple[str, ...], StopStringCriteria] = {}  # which read a vocabulary

    def options(self, request: Any) -> Options:
        """What a request asks for.

        Raises ValueError, TypeError or UnsupportedError by an option's name.
        """
        return _options_of(self.attachment, request, self.tokenizer, self._stop)

    def ids(self, name: str, given: Any) -> list[int]:
        """Token ids of a text, a list or a tensor, the argument `name`."""
        return _ids(self.attachment, name, given, self.tokenizer)

    def _stop(self, strings: str | list[str]) -> StopStringCriteria:
        if self.tokenizer is None:
            raise ValueError("tokenizer: stop_strings needs the model's tokenizer, got None")
        key = (strings,) if isinstance(strings, str) else tuple(strings)
        if key not in self.stops:
            if len(self.stops) == STOPS:
                self.stops.pop(next(iter(self.stops)))
            self.stops[key] = StopStringCriteria(self.tokenizer, list(key))
        return self.stops[key]


def _options_of(
    attachment: Attached,
    request: Any,
    tokenizer: Any,
    stop: Callable[[Any], StopStringCriteria],
) -> Options:
    if not isinstance(request, Request):
        hint = f"write Request({shown(request)})" if isinstance(request, str | list) else ""
        raise TypeError(wrong("requests", "Request objects", request, hint))
    options = dict(request.options)
    fields = GenerationConfig().to_dict()
    for name in options:
        if name not in fields and name not in BESIDE:
            raise UnsupportedError(
                f"{name}: no option of one of many requests, which are ids or a text, the fields "
                f"of a GenerationConfig and {', '.join(BESIDE)}"
            )
    ids = _ids(attachment, "inputs", request.inputs, tokenizer)
    processors = options.pop("logits_processor", None)
    allowed = options.pop("prefix_allowed_tokens_fn", None)
    config = merged_config(attachment, options)
    check_generate(attachment, options, config)
    _check(config)
    base, device = attachment.base, attachment.spec.device
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if config.pad_token_id is None and ends:
        config.pad_token_id = ends[0]  # nothing is padded; transformers would say so
    most = _most(config, len(ids))
    config.max_length = len(ids) + most
    base._prepare_special_tokens(config, True, device=device)
    stops = None if config.stop_strings is None else stop(config.stop_strings)
    return Options(
        ids=ids,
        most=most,
        sample=bool(config.do_sample),
        ends=frozenset(map(int, ends)),
        processors=base._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(ids),
            encoder_input_ids=torch.tensor([ids], device=device),
            prefix_allowed_tokens_fn=allowed,
            logits_processor=_own(processors),
            device=device,
            model_kwargs={},
        ),
        stops=stops,
    )


def _own(processors: Any) -> LogitsProcessorList:
    """Copies: some of transformers' keep what they saw."""
    return LogitsProcessorList(copy.copy(x) for x in processors or ())


def _ids(attachment: Attached, name: str, given: Any, tokenizer: Any) -> list[int]:
    if isinstance(given, str):
        if tokenizer is None:
            raise ValueError(wrong(name, "token ids, or a text beside tokenizer=", given))
        given = tokenizer(given)["input_ids"]
    if isinstance(given, Tensor):
        check_ids(name, given[None] if given.ndim == 1 else given)
        given = given[0] if given.ndim == 2 and len(given) == 1 else given
        if given.ndim != 1:
            raise ValueError(f"{name}: wanted ids [S] or [1, S], got {list(given.shape)}")
        given = given.tolist()
    # Of a long prompt, one look at its kinds of elements.
    whole = isinstance(given, list | tuple) and all(
        issubclass(kind, int) and kind is not bool for kind in set(map(type, given))
    )
    if not whole:
        said = isinstance(given, list) and given and isinstance(given[0], dict)
        hint = "write tokenizer.apply_chat_template(messages, tokenize=False, "
        hint = f"{hint}add_generation_prompt=True)" if said else ""
        raise TypeError(wrong(name, "a text, or token ids", given, hint))
    words = attachment.base.get_input_embeddings().num_embeddings
    outside = [n for n in (min(given), max(given)) if not 0 <= n < words] if given else []
    if not given or outside:
        raise ValueError(
            f"{name}: wanted one or more ids from 0 below {words}, got "
            f"{outside[0] if outside else 'none'}"
        )
    return list(given)


def _check(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in OWN_LOOP:
        name = asked_by(config, mode)
        raise UnsupportedError(f"{name}: many requests are decoded greedily or sampled")
    for name, (plain, instead) in REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value != plain:
            raise UnsupportedError(f"{name}: not for one of many requests: {instead}")


def _most(config: GenerationConfig, prompt: int) -> int:
    """New tokens at most."""
    if config.max_new_tokens is not None:
        most = whole(config.max_new_tokens)
    elif config.max_length is None:
        return DEFAULT
    else:
        most = whole(config.max_length) - prompt
    if most < 1:
        raise ValueError(
            f"max_new_tokens: wanted one new token or more, got {most} after {prompt} of the prompt"
        )
    return int(min(most, sys.maxsize // 2))
