"""What many requests are not served with, by name."""

from __future__ import annotations

from typing import Any

from ....errors import UnsupportedError
from ..attached import Attached
from ..own_steps import aside, check_sample, drops_positions, own_method
from ..wrappers import soft_prompt, takes_positions


def check_served(attachment: Attached) -> None:
    """Raises UnsupportedError for a model or a pipeline whose requests cannot share calls."""
    base, probe = attachment.base, attachment.served.probe
    name = type(base).__name__
    if not hasattr(base, "_get_logits_processor"):
        raise UnsupportedError(f"generate_many: {name} does not generate")
    check_sample(base)
    if attachment.ranks.many:
        raise UnsupportedError("generate_many: the model is shared by ranks; use generate")
    if soft_prompt(attachment.model):
        raise UnsupportedError("generate_many: not with a soft prompt, which generate serves")
    if method := own_method(base):
        raise UnsupportedError(
            f"generate_many: {method} is {name}'s own, which prepares the steps of a whole batch"
        )
    if not takes_positions(base):
        raise UnsupportedError(
            f"generate_many: the decoder of {name} takes no position_ids, so that it counts the "
            "columns of a batch, which sequences that come and go do not share"
        )
    if probe.first and drops_positions(base):
        raise UnsupportedError(
            f"generate_many: generate of {name} leaves positions to the model, "
            f"which counts from {probe.first}; use generate"
        )
    if probe.counts:
        raise UnsupportedError(
            f"generate_many: the attention of {name} counts columns ({probe.counts}), which "
            "sequences that come and go do not share"
        )
    for layer in attachment.spec.managed:
        eviction = attachment.pipeline.eviction.at(layer)
        if eviction.replayed:
            raise UnsupportedError(
                f"generate_many: {type(eviction).__name__} wants a replay before the prompt ends; "
                "read contexts by attached.read and attached.replay"
            )


def check_length(attachment: Attached, tokens: int) -> None:
    """Raises UnsupportedError where a model's RoPE depends on the longest sequence of a call."""
    base, aside_at = attachment.base, attachment.put_aside
    if aside_at is not None and tokens > aside_at:
        raise UnsupportedError(f"{aside(base)} after {aside_at} tokens, got {tokens} in all")
    config = base.config.get_text_config(decoder=True)
    for kind, limit in _limits(config):
        if tokens > limit:
            raise UnsupportedError(
                f"max_new_tokens: the RoPE of {type(base).__name__} ({kind}) changes after {limit} "
                f"tokens for all of a call, got {tokens} in all; use generate"
            )


def expected_new(attachment: Attached, prompt: int, most: int) -> int:
    """New tokens that memory is planned for: `most`, or what is left of the model's positions.

    Whoever asks for a million tokens means that the model shall end by itself.
    """
    config = attachment.base.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return most
    return max(min(most, positions - prompt), 1)


def _limits(config: Any) -> list[tuple[str, int]]:
    """The kinds of RoPE that follow the longest sequence, and up to where they do not."""
    given = getattr(config, "rope_parameters", None) or {}
    each = [given, *(x for x in given.values() if isinstance(x, dict))]
    found = []
    for one in each:
        kind = one.get("rope_type", "")
        if kind == "dynamic" or kind == "longrope":
            name = "original_max_position_embeddings"
            limit = one.get(name) or getattr(config, name, None) or config.max_position_embeddings
            found.append((kind, int(limit)))
    return found
