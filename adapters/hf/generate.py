"""The wrapped `generate`: makes the cache, names the phases, and decodes by our own loop."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from transformers.generation import GenerationConfig, GenerationMode

from ...errors import UnsupportedError
from .decode_loop import decode_loop

if TYPE_CHECKING:
    from .attach import Attachment

OWN_LOOP = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def generate(attachment: Attachment, *args: Any, **kwargs: Any) -> Any:
    """transformers' generate with a cache of the attached pipeline.

    Greedy decoding and sampling run our loop; beam search and assisted decoding run transformers'
    own loops on our cache.
    """
    kwargs = {**_named(attachment, args), **kwargs}
    if kwargs.get("custom_generate") is not None:
        raise UnsupportedError("custom_generate: not together with an attached pipeline")
    given = kwargs.pop("past_key_values", None)
    config = _config(attachment, kwargs)
    if config.use_cache is False:
        raise UnsupportedError("use_cache=False: an attached pipeline needs its cache; detach it")
    pipeline = attachment.pipeline
    phases_matter = not (pipeline.selection.neutral and pipeline.eviction.neutral)
    if phases_matter and config.guidance_scale not in (None, 1):
        raise UnsupportedError(
            "guidance_scale: the unconditional branch of classifier-free guidance does not say "
            "where its prompt ends; use an admission only"
        )
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    own = mode in OWN_LOOP
    if config.cache_implementation is not None:
        kwargs["cache_implementation"] = None
    if own:
        kwargs["custom_generate"] = decode_loop
        if kwargs.get("streamer") is not None:
            # transformers drops a streamer that goes with custom_generate
            kwargs["kvp_streamer"] = kwargs.pop("streamer")
    with attachment.generating():
        # A cache that nobody else sees is used again, with its captured graph.
        private = given is None and own and not config.return_dict_in_generate
        rows = next((x.shape[0] for x in _inputs(kwargs)), 1)
        rows *= int(config.num_return_sequences or 1)
        cache = attachment.idle.pop(rows, None) if private else None
        cache = cache or attachment.cache_for(given)
        cache.begin_prompt(_prompt_columns(kwargs))
        cache.counts_positions = "position_ids" not in kwargs
        output = attachment.original(**kwargs, past_key_values=cache)
        attachment.decoding = cache.decoding if own else f"transformers' loop: {mode.value}"
        if private and cache.graph is not None and cache.state is not None:
            cache.reset()
            attachment.idle[cache.state.batch] = cache
    return output


def _config(attachment: Attachment, kwargs: dict[str, Any]) -> GenerationConfig:
    """The options as transformers will merge them: the call's, else the model's."""
    own = attachment.base.generation_config
    config = copy.deepcopy(kwargs.get("generation_config") or own)
    config.update(**own.to_dict(), defaults_only=True)
    config.update(**kwargs)
    return config


def _named(attachment: Attachment, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of generate by their names."""
    names = inspect.signature(type(attachment.base).generate).parameters
    return dict(zip(list(names)[1:], args, strict=False))


def _inputs(kwargs: dict[str, Any]) -> list[Any]:
    found = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    return [x for x in found if x is not None]


def _prompt_columns(kwargs: dict[str, Any]) -> int:
    """Columns in cache and prompt together; without inputs generate starts from one BOS token."""
    widths = [x.shape[1] for x in _inputs(kwargs)]
    mask = kwargs.get("attention_mask")
    return max([*widths, 1 if mask is None else mask.shape[1]])
