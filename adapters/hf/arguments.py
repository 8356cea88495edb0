"""What is refused by name: arguments of generate, of forwards and of the attention interface."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from transformers.generation import GenerationConfig, GenerationMode

from ...errors import UnsupportedError
from .attached import Attached
from .models import Rules
from .uncut import check_uncut
from .wrappers import check_soft_prompt, soft_prompt

MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)
# Fields that ask for a way to generate which is not served, and what is in the way.
OTHER_LOOPS = {
    "assistant_early_exit": "it drafts with the model's first layers, whose cache is another one",
    "use_mtp": "it drafts with layers that the cache does not hold",
    "speculation_type": "its drafter reads the model's cache",
    "dola_layers": "its loop is fetched from the Hub",
    "penalty_alpha": "its loop is fetched from the Hub",
    "constraints": "its loop is fetched from the Hub",
    "force_words_ids": "its loop is fetched from the Hub",
    "num_beam_groups": "its loop is fetched from the Hub",
}
# Fields that ask for a mode, where they say something.
ASKING: dict[GenerationMode, tuple[str, ...]] = {
    GenerationMode.SAMPLE: ("do_sample",),
    GenerationMode.BEAM_SEARCH: ("num_beams",),
    GenerationMode.BEAM_SAMPLE: ("num_beams",),
    GenerationMode.ASSISTED_GENERATION: (
        "assistant_early_exit", "use_mtp", "prompt_lookup_num_tokens",
    ),
    GenerationMode.DOLA_GENERATION: ("dola_layers",),
    GenerationMode.CONTRASTIVE_SEARCH: ("penalty_alpha",),
    GenerationMode.CONSTRAINED_BEAM_SEARCH: ("constraints", "force_words_ids"),
    GenerationMode.GROUP_BEAM_SEARCH: ("num_beam_groups",),
}  # fmt: skip
# Fields that are about a cache or a compilation of transformers.
OTHER_CACHES = {
    "cache_implementation": "the pipeline's cache is used",
    "cache_config": "the pipeline's cache is used",
    "max_cache_len": "the pipeline's cache grows; cap it by attach(max_tokens=...)",
    "compile_config": "compile the layers by attach(compile=True)",
    "continuous_batching_config": "generate_batch does not serve an attached model",
}
KINDS = (
    "sliding_window", "layer_types", "attention_chunk_size", "num_hidden_layers",
    "num_kv_shared_layers",
)  # fmt: skip
# Arguments of other attention functions that change what is attended.
SCORES = ("position_bias", "head_mask", "cache")
SINKS = ("s_aux", "sinks")
BY_MODELS = ("softcap", *SINKS)  # which only a model's own layers may give
# Arguments of forwards, which generate hands on.
FORWARDS = {
    "encoder_hidden_states": "its keys and values come from no token of the cache's",
    "encoder_outputs": "its keys and values come from no token of the cache's",
    "return_shared_kv_states": "keys and values lie in pages, heads with different tokens",
}


def check_generate(attachment: Attached, kwargs: dict[str, Any], config: Any) -> None:
    """Raises UnsupportedError for what an attached model's `generate` does not serve."""
    check_handed_on(kwargs)
    if kwargs.get("custom_generate") is not None:
        raise UnsupportedError("custom_generate: not together with an attached pipeline")
    use = kwargs.get("use_cache", True if config.use_cache is None else config.use_cache)
    if not use:
        raise UnsupportedError(f"use_cache={use}: an attached pipeline needs its cache; detach it")
    if kwargs.get("synced_gpus"):
        raise UnsupportedError("synced_gpus: an attached model does not wait for other ranks")
    if config.is_assistant:
        raise UnsupportedError("is_assistant: an attached model drafts for no other; detach it")
    check_outputs(config.output_attentions)
    check_soft_prompt(attachment.model)
    given = kwargs.get("generation_config")
    for name, reason in OTHER_CACHES.items():
        asked = kwargs.get(name, None if given is None else getattr(given, name, None))
        if asked is not None:
            raise UnsupportedError(f"{name}: not beside an attached pipeline: {reason}")
    mode = config.get_generation_mode(kwargs.get("assistant_model"))
    _check_loop(config, mode, kwargs)
    check_uncut(config, mode, kwargs, soft=soft_prompt(attachment.model) is not None)
    drafted = kwargs.get("assistant_model") is not None
    drafter = "assistant_model" if drafted else "prompt_lookup_num_tokens"
    if mode == GenerationMode.ASSISTED_GENERATION and attachment.served.probe.own:
        raise UnsupportedError(
            f"{drafter}: candidates cannot be taken back from the recurrent or convolutional "
            f"states of {type(attachment.decoder).__name__}"
        )
    if mode == GenerationMode.ASSISTED_GENERATION and soft_prompt(attachment.model):
        raise UnsupportedError(
            f"{drafter}: not with a soft prompt, which hides where candidates begin"
        )
    if mode == GenerationMode.ASSISTED_GENERATION and config.guidance_scale not in (None, 1):
        raise UnsupportedError(
            "guidance_scale: not with assisted generation, whose candidates the unconditional "
            "branch would have to take back"
        )
    pipeline = attachment.pipeline
    phases_matter = not (pipeline.selection.neutral and pipeline.eviction.neutral)
    if phases_matter and config.guidance_scale not in (None, 1):
        raise UnsupportedError(
            "guidance_scale: the unconditional branch of classifier-free guidance does not say "
            "where its prompt ends; use an admission only"
        )


def _check_loop(config: GenerationConfig, mode: GenerationMode, kwargs: dict[str, Any]) -> None:
    for name in ("assistant_early_exit", "use_mtp", "speculation_type"):
        if getattr(config, name, None):
            raise UnsupportedError(f"{name}: not served: {OTHER_LOOPS[name]}")
    if mode in MODES:
        return
    name = asked_by(config, mode)
    raise UnsupportedError(f"{name}: not served: {OTHER_LOOPS.get(name, mode.value)}")


def asked_by(config: GenerationConfig, mode: GenerationMode) -> str:
    """The field of a config that asks for `mode`; for what none asks, `generate`."""
    said = ((name, getattr(config, name, None)) for name in ASKING.get(mode, ()))
    asked = (name for name, value in said if value is not None and value is not False)
    return next(asked, "generate")


def check_ahead(mask: Any, columns: int) -> None:
    """Raises UnsupportedError if a mask hides tokens that are yet to be generated."""
    if mask is not None and mask.ndim == 2 and not bool(mask[:, columns:].all()):
        raise UnsupportedError(
            f"attention_mask: it goes on after the {columns} columns of the prompt and hides "
            "tokens to come, which is not served"
        )


def check_outputs(attentions: Any) -> None:
    """Raises UnsupportedError if attention weights are asked for."""
    if attentions:
        raise UnsupportedError(
            "output_attentions: an attached pipeline computes no attention weights; detach it and "
            "use attn_implementation='eager'"
        )


def check_handed_on(kwargs: dict[str, Any]) -> None:
    """Raises UnsupportedError for arguments of a decoder's forward that are not served."""
    for name, reason in FORWARDS.items():
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise UnsupportedError(f"{name}: not with an attached pipeline: {reason}")


def check_causal(causal: bool | None) -> None:
    """Raises UnsupportedError if tokens shall see later ones."""
    if causal is False:
        raise UnsupportedError("is_causal=False: tokens would see later ones, which no cache holds")


def check_config(config: Any) -> None:
    """Raises UnsupportedError for a config that asks for what is not served."""
    check_outputs(getattr(config, "output_attentions", False))
    check_causal(getattr(config, "is_causal", True))


def kinds_of(config: Any) -> dict[str, Any]:
    """What of a config decides which tokens layers keep and see."""
    return {name: copy.copy(_said(config, name)) for name in KINDS}


def _said(config: Any, name: str) -> Any:
    """A config's value, or those of its layers where it says that they differ."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' refusal to say one of several
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def check_kinds(config: Any, attached: dict[str, Any]) -> None:
    """Raises UnsupportedError if a config no longer says what it did at `attach`."""
    for name, value in attached.items():
        if _said(config, name) != value:
            raise UnsupportedError(
                f"config.{name}: it has changed since attach, and layers keep what it said then; "
                "detach, change it, attach again"
            )


def check_modules(layers: list[Any]) -> None:
    """Raises UnsupportedError for attention modules that are not what their kind's are."""
    if not all(getattr(m, "is_causal", True) for m in layers):
        raise UnsupportedError(
            "is_causal=False: every token would see later ones; caches hold none"
        )


def check_forward(decoder: Any, layers: list[Any], kwargs: dict[str, Any]) -> None:
    """Raises UnsupportedError for a forward that an attached decoder does not serve."""
    wanted = kwargs.get("output_attentions")
    check_outputs(decoder.config.output_attentions if wanted is None else wanted)
    if kwargs.get("is_causal") is False:
        raise UnsupportedError(
            "is_causal=False: every token would see later ones; caches hold none"
        )
    check_handed_on(kwargs)
    check_modules(layers)
    _check_scores(kwargs, *BY_MODELS)
    if not decoder.training and not any(module.training for module in layers):
        return
    if any(getattr(m, "gradient_checkpointing", False) and m.training for m in decoder.modules()):
        raise UnsupportedError(
            "gradient_checkpointing: it runs layers without their cache; call model.eval(), or "
            "detach to train"
        )
    if any(module.training and getattr(module, "attention_dropout", 0) for module in layers):
        raise UnsupportedError(
            "attention_dropout: an attached model serves inference only; call model.eval()"
        )


def check_attention(rules: Rules, scaling: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raises UnsupportedError for arguments of an attention function that are not served."""
    if dropout:
        raise UnsupportedError(
            "dropout: an attached model serves inference only; call model.eval()"
        )
    for name, given, known in (
        ("scaling", scaling, rules.scale),
        ("softcap", kwargs.get("softcap"), rules.softcap),
    ):
        if given is not None and given != known:
            raise UnsupportedError(
                f"{name}: wanted {known}, with which the cache was made, got {given}"
            )
    check_causal(kwargs.get("is_causal"))
    _check_scores(kwargs, *(name for name in SINKS if name != rules.sinks))


def _check_scores(kwargs: dict[str, Any], *more: str) -> None:
    for name in (*SCORES, *more):
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"{name}: this model's attention scores are not served")


def by_position(functions: Iterable[Callable[..., Any]], last: Sequence[str] = ()) -> list[str]:
    """Names of a call's arguments by position, which each function's `*args` hands to the next.

    The functions are as they are called, without `self`; `last` names those of one after them.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names: list[str] = []
    for function in functions:
        found = inspect.signature(function).parameters.values()
        names += [x.name for x in found if x.kind in kinds][len(names) :]
        if not any(x.kind is x.VAR_POSITIONAL for x in found):
            return names
    return [*names, *last[len(names) :]]


def methods(holder: Any, name: str) -> Iterator[Callable[..., Any]]:
    """What an object's method `name` may call by `super()`, itself first."""
    if name in vars(holder):
        yield vars(holder)[name]
    for kind in type(holder).__mro__:
        if name in vars(kind):
            yield vars(kind)[name].__get__(holder, kind)


def by_name(
    call: str, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by their names; raises TypeError as the call itself would."""
    if len(args) > len(names):
        raise TypeError(
            f"{call}: wanted at most {len(names)} arguments by position, got {len(args)}"
        )
    twice = [name for name in names[: len(args)] if name in kwargs]
    if twice:
        raise TypeError(f"{call}: got {twice[0]} both by position and by name; give it once")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def as_given(places: Sequence[str], args: int, kwargs: dict[str, Any]) -> list[Any]:
    """Takes the first `args` arguments out of `kwargs` again, for who looks at them by position.

    One that was taken away is None.
    """
    return [kwargs.pop(name, None) for name in places[:args]]
