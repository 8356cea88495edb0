"""What a `generate` of ours made ready, against what transformers' own is called with in the end.

Between the two may lie a `generate` of the model's own class, which wraps the library's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import attrs
from transformers.generation import GenerationConfig, GenerationMode

from ...errors import UnsupportedError
from .arguments import asked_by
from .attached import Attached

CHECKED = "_validate_generation_mode"  # which transformers' generate calls, and nothing else
OWN_LOOP = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}  # which ours decodes
BEAMS = {GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE}
# Fields of a config by which our generate chose the loop, the rows and where the prompt ends.
_DECIDING = {
    "num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1, "prefill_chunk_size": 0,
    "output_attentions": False, "is_assistant": False, "use_cache": True,
}  # fmt: skip


@attrs.define
class Planned:
    """The merged `config` and `mode` of one call, which prepares for one generation."""

    model: Any
    config: GenerationConfig
    mode: GenerationMode
    used: bool = False

    def check(self, mode: GenerationMode, config: GenerationConfig) -> None:
        """Raises UnsupportedError where something else is generated than was planned."""
        name = f"{type(self.model).__name__}"
        if self.used:
            raise UnsupportedError(
                f"generate: {name} generates twice in one call, for which an attached pipeline has "
                "one cache; detach it"
            )
        self.used = True
        for field, default in _DECIDING.items():
            one, other = (getattr(c, field, None) for c in (self.config, config))
            one, other = (default if x is None else x for x in (one, other))
            if one != other:
                raise UnsupportedError(_changed(field, name, one, other))
        if mode != self.mode and not {mode, self.mode} <= OWN_LOOP:
            field = _asked(config, mode, self.config, self.mode)
            raise UnsupportedError(_changed(field, name, self.mode.value, mode.value))

    def check_columns(self, planned: int | None, columns: int) -> None:
        """The same for the columns of the first forward, where a prompt was `planned` to end."""
        assisted = self.mode == GenerationMode.ASSISTED_GENERATION
        if planned is None or self.config.prefill_chunk_size is not None:
            return
        if columns < planned or (columns > planned and not assisted):
            name = f"{type(self.model).__name__}"
            raise UnsupportedError(_changed("input_ids", name, planned, columns))


def _asked(
    config: GenerationConfig, mode: GenerationMode, ours: GenerationConfig, planned: GenerationMode
) -> str:
    """The field that asks for `mode` instead of what was `planned`, or no longer for that."""
    if {mode, planned} == BEAMS:
        return "do_sample"
    field = asked_by(ours if mode in OWN_LOOP else config, planned if mode in OWN_LOOP else mode)
    by_model = GenerationMode.ASSISTED_GENERATION in (mode, planned)
    return "assistant_model" if field == "generate" and by_model else field


def _changed(field: str, name: str, planned: Any, found: Any) -> str:
    return (
        f"{field}: {name} hands {found} on where its caller said {planned}, for which an attached "
        "pipeline has made ready; say so in the call"
    )


def guarded(attachment: Attached, plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, the model's method CHECKED, which ours looks at first.

    Raises UnsupportedError for a generate of the class that nobody called through the model's.
    """

    def check(mode: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        planned = attachment.forwards.planned
        if planned is None:
            raise UnsupportedError(
                "generate: the class's or an inner model's was called past the one to which the "
                "pipeline is attached; call generate of the model that was attached, or detach it"
            )
        planned.check(mode, config)
        return plain(mode, config, *args, **kwargs)

    return check


def check_hands_on(original: Callable[..., Any]) -> None:
    """Raises UnsupportedError for a `generate` that takes no argument which it does not know."""
    found = inspect.signature(original).parameters.values()
    if not any(x.kind is x.VAR_KEYWORD for x in found):
        raise UnsupportedError(
            "generate: the model's own takes no **kwargs, in which the pipeline's cache would go "
            "on to transformers'; give it some"
        )
