"""The wrapped `generate`: makes the cache, names the phases, and decodes by our own loop."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode

from ..._arguments import check_ids
from ...errors import PhaseError, UnsupportedError
from .arguments import as_given, by_name, by_position, check_ahead, check_generate, methods
from .attached import Attached
from .cache import KVPolicyCache
from .columns import check_stored
from .decode_loop import decode_loop
from .kept_logits import check_generated
from .lengths import new_tokens
from .masks import check_mask
from .modes import ordinary
from .moved import give
from .own_steps import (
    aside,
    check_put_aside,
    check_sample,
    drops_positions,
    own_method,
    takes_cache,
)
from .planned import OWN_LOOP, Planned, check_hands_on
from .tiles import refuse_more, whole_chunks
from .tokens import heal, inferred_mask, use_mask, use_tokenizer
from .uncut import check_routed, shorten_mask
from .wrappers import soft_prompt, unwrapped

_NAMES = by_position([GenerationMixin.generate])[1:]


def generate(attachment: Attached, *args: Any, **kwargs: Any) -> Any:
    """transformers' generate with a cache of the attached pipeline.

    Greedy decoding and sampling run our loop; beam search and assisted decoding run transformers'
    own loops on our cache.
    """
    if not attachment.attached:  # kept by its caller, or by a copy of the model
        raise PhaseError(
            "generate: it belongs to an attachment that was detached; generate inside "
            "attach(model, pipeline), or call the model's own. A copy.copy that was made of an "
            "attached model keeps it: copy before attaching"
        )
    places = _places(attachment) if args else []
    kwargs = by_name("generate", places, args, kwargs)
    return run(attachment, kwargs, places=places[: len(args)])


@ordinary
def run(
    attachment: Attached,
    kwargs: dict[str, Any],
    question: str | None = None,
    places: Sequence[str] = (),
) -> Any:
    """Generates after a prompt, or after a question about what the given cache holds.

    The arguments of the names `places` go on by position.
    """
    with attachment.forwards.holding():
        return _run(attachment, kwargs, question, places)


def _run(
    attachment: Attached, kwargs: dict[str, Any], question: str | None, places: Sequence[str]
) -> Any:
    _check_ids(kwargs, getattr(attachment.base, "main_input_name", "input_ids"))
    config = merged_config(attachment, kwargs)
    check_mask(kwargs.get("attention_mask"))
    if config.guidance_scale not in (None, 1):
        name = "negative_prompt_attention_mask"
        check_mask(kwargs.get(name), name)
    check_generate(attachment, kwargs, config)
    check_hands_on(attachment.original)
    if question is None:
        whole_chunks(attachment, config, kwargs)
    given = kwargs.pop("past_key_values", None)
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    own = mode in OWN_LOOP
    if own:
        check_sample(attachment.base)
    if config.cache_implementation is not None:
        kwargs["cache_implementation"] = None
    if own:
        kwargs["custom_generate"] = decode_loop
        if kwargs.get("streamer") is not None:
            # transformers drops a streamer that goes with custom_generate
            kwargs["kvp_streamer"] = kwargs.pop("streamer")
    heal(attachment, kwargs, config, getattr(given, "columns", 0))
    if own:
        use_tokenizer(kwargs, config)
    # A cache that nobody else sees is used again, with its captured graph.
    private = given is None and own and not config.return_dict_in_generate
    batch = next((x.shape[0] for x in _inputs(kwargs)), 1)
    rows = batch * int(config.num_return_sequences or 1)
    cache = attachment.idle.pop(rows, None) if private else None
    cache = cache or attachment.cache_for(given)
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    use_mask(cache, kwargs, config)
    columns = _prompt_columns(attachment, cache, kwargs)
    width = max([x.shape[1] for x in _inputs(kwargs)], default=1)
    if width == columns <= cache.columns and not soft_prompt(attachment.model):
        if not columns:
            raise ValueError("input_ids: wanted a prompt of one column or more, got none")
        raise ValueError(
            f"input_ids: wanted all turns, more than the {cache.columns} columns that the cache "
            f"has seen, got {columns}; write torch.cat([ids, next_turn], 1), or take a new cache"
        )
    _check_mask(cache, kwargs.get("attention_mask"), batch, copies, width, columns)
    _check_last(inferred_mask(kwargs, config), " (pad_token_id says so, where no mask is given)")
    assisted = mode == GenerationMode.ASSISTED_GENERATION  # whose candidates may go further
    if assisted:
        mask = kwargs.get("attention_mask")
        mask = inferred_mask(kwargs, config) if mask is None else mask
        check_routed(attachment.decoder.config, kwargs, mask)
    if assisted and width == columns > cache.columns > 0:
        raise UnsupportedError(
            "past_key_values: assisted decoding reads all its ids, in transformers too, those that "
            "the cache has seen once more; pass the new ids only, beside a mask of all columns"
        )
    if assisted and width < columns:
        shorten_mask(kwargs, width, columns)
    tokens = new_tokens(config, kwargs, width)
    if not assisted:  # whose loop says itself how many columns it wants
        check_generated(config, kwargs, batch, copies, columns - cache.columns, tokens > 1)
    last = columns + tokens - (not assisted)
    check_put_aside(attachment.base, attachment.put_aside, cache.columns, columns, last)
    held = cache.state.batch if cache.state is not None and cache.chunks else batch * copies
    if held != batch * copies and _inputs(kwargs):
        raise ValueError(
            f"input_ids: the cache holds {held} sequences, got a batch of {batch * copies}"
        )
    seen, phase = cache.columns, (cache.phase, cache.boundary)
    # Our loop says itself when the prompt has ended.
    boundary = None if own else columns
    if question != "decode":
        refuse_more(attachment, cache)
    if question is None:
        cache.begin_prompt(boundary)
    else:
        cache.begin_question(None if question == "decode" else columns)
    cache.counts_columns = bool(soft_prompt(attachment.model))
    cache.counts_own = bool(attachment.served.probe.first) and drops_positions(attachment.base)
    dropped = cache.counts_own or "position_ids" not in kwargs
    given_places = not dropped or cache.counts_columns
    cache.counts_positions = not given_places and not own_method(attachment.base)
    draws = config.do_sample and not own  # our loop hands on the tokens that rank 0 chose
    device = cache.spec.device
    if given is not None or takes_cache(attachment.base, cache):
        kwargs["past_key_values"] = cache
    elif own:
        kwargs["kvp_cache"] = cache
    ready = merged_config(attachment, kwargs)
    forwards = attachment.forwards
    # Those of a generate around this one.
    outer = forwards.planned, forwards.expected
    forwards.planned = planned = Planned(attachment.base, ready, mode)
    forwards.expected = cache
    give(forwards.moving, cache.moved)
    try:
        with attachment.ranks.one_seed(device) if draws else contextlib.nullcontext():
            positional = as_given(places, len(places), kwargs)
            output = attachment.original(*positional, **kwargs)
        if planned.used and forwards.expected is cache:  # by a loop of the library's, without it
            raise UnsupportedError(aside(attachment.base))
    except BaseException as error:
        if cache.columns == seen:  # nothing was read
            cache.phase, cache.boundary = phase
        if own and "'custom_generate'" in str(error) and isinstance(error, ValueError):
            raise UnsupportedError(
                "generate: the model's own has a loop that transformers' generate does not run, "
                "and takes no other; detach for it"
            ) from error
        raise
    finally:
        forwards.planned, forwards.expected = outer
        # Position ids that forwards give themselves count afterwards.
        cache.counts_positions = cache.counts_columns = cache.counts_own = False
    attachment.decoding = cache.decoding if own else f"transformers' loop: {mode.value}"
    if given is None:
        attachment.used(cache)
    # That of one sequence also where its prompts are captured: it takes long to make beside them.
    worth = cache.graph is not None or (rows == 1 and attachment.prompts == "captured")
    if private and worth and cache.state is not None:
        cache.reset()
        attachment.idle[cache.state.batch] = cache
    return output


def _check_ids(kwargs: dict[str, Any], main: str) -> None:
    """Raises for texts, lists, single rows and floats, which transformers takes for ids [B, S]."""
    for name in ("inputs", "input_ids"):
        value = kwargs.get(name)
        if value is None:
            continue
        plain = isinstance(value, Tensor) and value.ndim > 1
        if not plain or (main == "input_ids" and value.ndim == 2 and value.is_floating_point()):
            check_ids(name, value)


def _check_mask(
    cache: KVPolicyCache, mask: Tensor | None, batch: int, copies: int, width: int, columns: int
) -> None:
    """transformers drops masks of ones, so that forwards do not see them all."""
    if mask is None:
        return
    if len(mask) != batch and (len(mask) > 1 or copies > 1):
        raise ValueError(
            f"attention_mask: wanted a row for each of the {batch} prompts, got {list(mask.shape)}"
        )
    check_ahead(mask, columns)
    if mask.shape[1] != width and mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask: wanted {columns} columns or more, got {list(mask.shape)} beside "
            f"{width} columns of input"
        )
    _check_last(mask[:, :columns])
    if cache.state is not None and cache.chunks and mask.shape[1] >= columns > cache.columns:
        check_stored(mask, cache.chunks, cache.state.batch)


def _check_last(mask: Tensor | None, why: str = "") -> None:
    if mask is not None and not bool(mask[:, -1].all()):
        raise UnsupportedError(
            f"attention_mask: it hides a row's last column{why}, whose logits the first token "
            "would come from; pad prompts on the left"
        )


def merged_config(attachment: Attached, kwargs: dict[str, Any]) -> GenerationConfig:
    """The options as transformers will merge them: the call's, else the model's."""
    own = getattr(attachment.model, "generation_config", attachment.base.generation_config)
    config: GenerationConfig = copy.deepcopy(kwargs.get("generation_config") or own)
    if isinstance(config.watermarking_config, dict):  # as files have it
        marks = GenerationConfig(watermarking_config=config.watermarking_config)
        config.watermarking_config = marks.watermarking_config
    config.update(**own.to_dict(), defaults_only=True)
    # Beside penalty_alpha, transformers' default tells contrastive from greedy search.
    config.update(top_k=own._get_default_generation_params()["top_k"], defaults_only=True)
    config.update(**kwargs)
    return config


def _places(attachment: Attached) -> list[str]:
    """The names of generate's arguments by position, through wrappers that hand `*args` on."""
    holders = (unwrapped(attachment.model), attachment.base)
    found = (method for holder in holders for method in methods(holder, "generate"))
    return by_position(itertools.chain([attachment.original], found), _NAMES)


def _inputs(kwargs: dict[str, Any]) -> list[Any]:
    found = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    return [x for x in found if x is not None]


def _prompt_columns(attachment: Attached, cache: KVPolicyCache, kwargs: dict[str, Any]) -> int:
    """Columns in cache and prompt together; without inputs generate starts from one BOS token.

    As transformers reads its arguments: ids are the whole sequence if the mask is as wide, else
    what follows the cache; embeddings are always the whole.
    """
    soft = soft_prompt(attachment.model)
    extra = soft.num_virtual_tokens if soft and not cache.columns else 0
    if kwargs.get("inputs_embeds") is not None:
        return int(kwargs["inputs_embeds"].shape[1]) + extra
    width = max([x.shape[1] for x in _inputs(kwargs)], default=1)
    mask = kwargs.get("attention_mask")
    follows = mask is not None and mask.shape[1] != width
    return width + extra + (cache.columns if follows else 0)
