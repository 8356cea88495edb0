"""Decode steps that only the model's own code can prepare, and caches that it puts aside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import utils as generation

from ...errors import UnsupportedError
from .cache import KVPolicyCache

# What our loop gives to every step itself, or leaves out since it changes no logits.
GIVEN = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache",
    "logits_to_keep", "cache_position", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits", "labels",
}  # fmt: skip
# What tells where images and videos are, for the positions of a prompt.
PLACES = {
    "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "rope_deltas",
    "use_audio_in_video", "audio_feature_lengths", "feature_attention_mask",
    "video_second_per_grid",
}  # fmt: skip
# What transformers gives to a prompt's first forward alone.
DROPPED = {*getattr(generation, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ())}
OF_PROMPTS = {*DROPPED, *PLACES}
METHODS = (
    "prepare_inputs_for_generation", "_update_model_kwargs_for_generation",
    "_prepare_position_ids_for_generation",
)  # fmt: skip
LOOP = ("_sample", "_has_unfinished_sequences")  # in whose place ours runs
KNOWN = ("transformers.", "peft.")  # whose steps add nothing to what our loop gives


def check_sample(model: Any) -> None:
    """Raises UnsupportedError for a model that decodes by a loop of its own."""
    for name in LOOP:
        method, plain = getattr(model, name, None), getattr(GenerationMixin, name, None)
        if method is not None and getattr(method, "__func__", method) is not plain:
            raise UnsupportedError(
                f"{name}: {type(model).__name__} decodes by a loop of its own, in place of which "
                "an attached pipeline's would run; detach it"
            )


def own_method(model: Any) -> str | None:
    """The method by which a model that no library made prepares its steps itself, if it does."""
    for holder in (model, type(model)):
        for name in METHODS:
            method = getattr(holder, name, None)
            made = getattr(getattr(method, "__func__", method), "__module__", "transformers.")
            if not str(made).startswith(KNOWN):
                return name
    return None


def why_own(model: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Why steps must be prepared by the model's own methods, None if our loop says the same."""
    method = own_method(model)
    if method:
        return f"{method}: it is the model's own"
    more = [
        name
        for name, value in model_kwargs.items()
        if value is not None and name not in GIVEN and name not in OF_PROMPTS
    ]
    return f"{', '.join(more)}: every step takes it" if more else None


class OwnSteps:
    """Prepares the forwards of decode steps as transformers' loop does.

    Masks are left out: the cache knows which columns are real, and which rows have ended.
    """

    def __init__(
        self,
        model: Any,
        cache: KVPolicyCache,
        model_kwargs: dict[str, Any],
        output: Any,
        reason: str,
    ) -> None:
        self.model, self.cache, self.reason = model, cache, reason
        cache.counts_positions = False  # the model's own say them
        self.kwargs = self._updated(output, dict(model_kwargs))

    def _updated(self, output: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.model._update_model_kwargs_for_generation(
            output, kwargs, is_encoder_decoder=False
        )
        return found

    def forward(self, ids: Tensor, records: Mapping[str, Any]) -> Any:
        """The output of one step; `ids` `[B, columns]` end with the token that it feeds."""
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, **self.kwargs
        )
        if inputs.get("past_key_values") is not self.cache:
            raise UnsupportedError(aside(self.model))
        inputs["attention_mask"] = None
        wanted = {f"output_{name}": asked for name, asked in records.items()}
        output = self.model(**{**inputs, **wanted, "return_dict": True})
        self.kwargs = self._updated(output, self.kwargs)
        return output


class _Seen:
    """A cache of `columns`, to ask a model what it does with one."""

    is_compileable = False

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns


@torch.no_grad()
def put_aside_at(model: Any) -> int | None:
    """The columns that a cache may see before `prepare_inputs_for_generation` puts it aside.

    As models do whose RoPE changes with the length, and that read all again with another one; None
    if the model does not.
    """
    config = model.config.get_text_config(decoder=True)
    most = getattr(config, "original_max_position_embeddings", None)
    method = getattr(model, "prepare_inputs_for_generation", None)
    if method is None or not isinstance(most, int):
        return None
    seen: Any = _Seen(most)
    ids = torch.zeros(1, most + 1, dtype=torch.long, device=model.device)
    try:
        inputs = method(ids, next_sequence_length=1, past_key_values=seen, use_cache=True)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # a call says what is wrong
    return None if inputs.get("past_key_values") is seen else most


@torch.no_grad()
def drops_positions(model: Any) -> bool:
    """Whether `prepare_inputs_for_generation` leaves position ids to the model's own forward."""
    method = getattr(model, "prepare_inputs_for_generation", None)
    if method is None:
        return False
    seen: Any = _Seen(1)
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    given = {"position_ids": torch.arange(2, device=model.device)[None], "use_cache": True}
    try:
        inputs = method(ids, next_sequence_length=1, past_key_values=seen, **given)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False  # a call says what is wrong
    return inputs.get("position_ids") is None


def check_put_aside(model: Any, most: int | None, before: int, prompt: int, last: float) -> None:
    """Raises UnsupportedError if a call crosses `put_aside_at`, which is `most`.

    The cache has seen `before` columns, `prompt` with the prompt's, and will have seen `last`.
    """
    if most is None or before > most or last <= most or (not before and prompt > most):
        return
    raise UnsupportedError(
        f"{aside(model)} after {most} columns, when its RoPE changes, and reads all again; this "
        f"call goes from {before or prompt} to {last}. Stay below by max_new_tokens, or begin with "
        f"a prompt of more than {most} columns"
    )


def check_kept(model: Any, cache: KVPolicyCache, output: Any) -> None:
    """Raises UnsupportedError for the output of a prompt that went through another cache."""
    kept = getattr(output, "past_key_values", None)
    if cache.state is None or (kept is not None and kept is not cache):
        raise UnsupportedError(aside(model))


def aside(model: Any, method: str = "prepare_inputs_for_generation") -> str:
    """That a model's method puts a cache aside."""
    return f"past_key_values: {method} of {type(model).__name__} puts the cache aside"


def takes_cache(model: Any, cache: KVPolicyCache) -> bool:
    """Whether transformers' generate takes a cache by name for a model, as its signatures say.

    One that does not gets an empty one of transformers' own, in whose place ours goes.
    """
    try:
        model._validate_model_kwargs({"past_key_values": cache})
    except ValueError:
        return False
    return True
