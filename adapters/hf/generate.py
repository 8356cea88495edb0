"""The wrapped `generate`: makes the cache, names the phases, and decodes by our own loop."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers.generation import GenerationMode

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
    if kwargs.get("use_cache") is False:
        raise UnsupportedError("use_cache=False: an attached pipeline needs its cache; detach it")
    if kwargs.get("custom_generate") is not None:
        raise UnsupportedError("custom_generate: not together with an attached pipeline")
    given = kwargs.pop("past_key_values", None)
    config = copy.deepcopy(kwargs.get("generation_config") or attachment.base.generation_config)
    config.update(**kwargs)
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    own = mode in OWN_LOOP and not (config.output_attentions or config.output_hidden_states)
    # A cache that nobody else sees is used again, with its captured graph.
    private = given is None and own and not config.return_dict_in_generate
    cache = attachment.idle.pop(_batch(args, kwargs), None) if private else None
    cache = cache or attachment.cache_for(given)
    cache.begin_prompt(_prompt_columns(args, kwargs))
    kwargs["past_key_values"] = cache
    kwargs["cache_implementation"] = None
    if own:
        kwargs["custom_generate"] = decode_loop
        if kwargs.get("streamer") is not None:
            # transformers drops a streamer that goes with custom_generate
            kwargs["kvp_streamer"] = kwargs.pop("streamer")
    output = attachment.original(*args, **kwargs)
    attachment.decoding = cache.decoding if own else f"transformers' loop: {mode.value}"
    if private and cache.graph is not None and cache.state is not None:
        batch = cache.state.batch
        cache.reset()
        attachment.idle[batch] = cache
    return output


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Sequences that generate will decode together."""
    given = [args[0] if args else None]
    given += [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
    rows = next((x.shape[0] for x in given if x is not None), 1)
    return rows * int(kwargs.get("num_return_sequences") or 1)


def _prompt_columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Columns in cache and prompt together, where the inputs tell."""
    inputs = [args[0] if args else None]
    names = ("inputs", "input_ids", "attention_mask", "inputs_embeds")
    inputs += [kwargs.get(name) for name in names]
    widths = [x.shape[1] for x in inputs if x is not None]
    return max(widths, default=None)
