"""One forward of an attached model: planned before its first layer, committed after its last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from .cache import KVPolicyCache
from .columns import new_columns
from .layout import Columns, decode_columns, prompt_columns
from .modes import ordinary
from .own_steps import DROPPED


def inputs_of(kwargs: dict[str, Any]) -> Tensor:
    """Token ids or embeddings `[B, S, ...]` of a decoder's forward."""
    found: Tensor | None = kwargs.get("inputs_embeds")
    found = kwargs.get("input_ids") if found is None else found
    if found is None:
        raise ValueError("input_ids: wanted token ids, or inputs_embeds, got neither")
    return found


def check_inputs(kwargs: dict[str, Any]) -> None:
    """Raises ValueError for inputs of another shape, such as choices `[B, N, S]` of a question."""
    for name, shape in (("input_ids", ("B", "S")), ("inputs_embeds", ("B", "S", "hidden"))):
        found = kwargs.get(name)
        if found is not None and found.ndim != len(shape):
            wanted, got = ", ".join(shape), list(found.shape)
            raise ValueError(f"{name}: wanted [{wanted}], got {got}; give every text a row")


@ordinary
def open_forward(
    cache: KVPolicyCache,
    batch: int,
    columns: int,
    mask: Tensor | None,
    texts: list[int] | None = None,
) -> None:
    """Plans a forward and opens the call on the cache's state.

    `texts`: lengths of the texts that the rows pack, each a sequence of the cache.
    """
    sequences = len(texts) if texts else batch
    if cache.chunks:
        cache.check_batch(sequences)
    mask = new_columns(mask, cache.chunks, batch, columns)
    state = cache.ensure_state(sequences)
    if mask is not None and not cache.served.probe.hides and not bool(mask.all()):
        raise UnsupportedError(
            "attention_mask: it hides columns, but this model counts them in its positions or "
            "reads them in recurrent layers; give it rows of one length"
        )
    hidden = bool(texts) or (mask is not None and not bool(mask.all()))
    _check_counted(cache, columns, hidden)
    if cache.states:
        cache.states.check(columns, mask, state.active, cache.gapped, packed=bool(texts))
        cache.before = None if cache.capturing else cache.states.snapshot()
    if texts:
        layout = Columns(batch, columns, 0)
        cache.pipeline.begin(state, texts, "prompt")
    elif cache.phase == "prompt":
        layout, lengths = prompt_columns(batch, columns, mask)
        cache.pipeline.begin(state, lengths, "prompt")
    else:
        layout, lengths, valid = decode_columns(batch, columns, mask)
        cache.pipeline.begin(state, lengths, "decode", valid=valid)
    cache.layout = layout


def _check_counted(cache: KVPolicyCache, columns: int, hidden: bool) -> None:
    """Raises UnsupportedError where a model's own count of columns is not that of tokens."""
    probe, state = cache.served.probe, cache.state
    assert state is not None
    if not probe.counts or cache.columns + columns < probe.counts_from:
        return
    on = [n for n, active in zip(state.lengths, state.active, strict=True) if active]
    if hidden or any(n != cache.columns for n in on):
        raise UnsupportedError(
            f"attention_mask: this model's attention counts columns, hidden ones too "
            f"({probe.counts}), which shows from {probe.counts_from} columns on; give it rows of "
            "one length, without padding"
        )


def left_out(cache: KVPolicyCache) -> UnsupportedError | None:
    """An error where layers with keys of their own did not run in this forward."""
    state = cache.state
    assert state is not None and state.call is not None
    missing = [n for n in range(state.spec.layers) if n not in state.call.done]
    if not missing:
        return None
    return UnsupportedError(
        f"layers: {missing} of the attached model did not run in this forward: they were skipped, "
        "replaced or taken out; detach, change the model, attach again"
    )


@ordinary
def close_forward(cache: KVPolicyCache, failed: bool) -> None:
    """Commits the call, or takes it back."""
    layout, cache.layout, cache.failure = cache.layout, None, None
    before, cache.before = cache.before, None
    state = cache.state
    assert layout is not None and state is not None
    if failed and cache.capturing:  # nothing ran; the rehearsal puts the host's numbers back
        return
    if failed:
        cache.pipeline.abort(state)
        if before is not None:
            cache.states.restore(before)
        if not cache.chunks:
            cache.state = cache.graph = None  # as before the first forward
        return
    if cache.capturing:
        cache.pipeline.commit(state, evict=False)
        return
    cache.states.settle()
    valid = layout.valid
    if layout.decode and not all(state.active):
        active = torch.tensor(state.active)[:, None].expand(layout.batch, layout.decode)
        valid = active if valid is None else valid & active
    try:
        cache.pipeline.commit(state, evict=not cache.recording)
    finally:
        if state.call is None:  # an eviction may fail after the tokens are in
            cache.saw(layout.prompt + layout.decode, valid)
    if cache.phase == "prompt" and cache.boundary is not None and cache.columns >= cache.boundary:
        cache.end_prompt()


# What is put at columns of images, by the argument that says which columns these are.
PLACED = {
    "deepstack_visual_embeds": "visual_pos_masks",
    "deepstack_features": "vision_mask",
    "image_embeds": "image_embeds_position_mask",
}
# Of images and sounds that a decoder reads itself: not of columns, however long they are.
RAW = ("image_", "pixel_", "video_", "audio_", "input_features", "protein_", "structure_", "msa_")


def parted(kwargs: dict[str, Any], head: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A forward's arguments for its first `head` columns and for the rest.

    What says something of each of the columns `[B, S, ...]` is cut, whatever its name, but for
    images and sounds that the decoder reads itself. Raises UnsupportedError for lists and dicts of
    other tensors, of which nobody knows what belongs to which part.
    """
    batch, columns = inputs_of(kwargs).shape[:2]
    first, rest = dict(kwargs), dict(kwargs)
    for name, whole in kwargs.items():
        axis = -1 if name == "position_ids" else 1
        held = list(whole.values()) if isinstance(whole, dict) else whole
        several = isinstance(held, list | tuple) and any(isinstance(x, Tensor) for x in held)
        places = kwargs.get(PLACED.get(name, ""))
        if places is not None and (several or isinstance(whole, Tensor)):
            places = places.bool() if places.ndim == 2 else places.bool().any(-1)
            at = torch.arange(columns, device=places.device).expand(batch, -1)[places]
            for part, chosen in ((first, at < head), (rest, at >= head)):
                part[name] = _chosen(whole, chosen) if bool(chosen.any()) else None
        elif several:
            raise UnsupportedError(f"{name}: not beside candidates of assisted generation")
        elif name in DROPPED:
            rest[name] = None  # its tokens are the prompt's
        elif name.startswith(RAW) and name not in PLACED.values():
            continue
        elif isinstance(whole, Tensor) and whole.ndim > 1 and whole.shape[axis] == columns:
            if axis == 1 and whole.shape[0] not in (1, batch):
                continue
            first[name] = whole.narrow(axis, 0, head)
            rest[name] = whole.narrow(axis, head, columns - head)
    return first, rest


def _chosen(whole: Any, chosen: Tensor) -> Any:
    """Of what is put at columns, one tensor `[..., hidden]` or one for each layer, the chosen."""
    if isinstance(whole, Tensor):
        return whole.reshape(-1, whole.shape[-1])[chosen.to(whole.device)]
    if isinstance(whole, dict):
        return {layer: _chosen(x, chosen) for layer, x in whole.items()}
    return [_chosen(x, chosen) for x in whole]


class Crossing:
    """A forward that goes on past the end of the prompt: candidate tokens of assisted decoding.

    It runs as two, so that the prompt ends in between. `finish` joins their outputs; `undo` takes
    the prompt's forward back.
    """

    def __init__(self, decoder: nn.Module, cache: KVPolicyCache, kwargs: dict[str, Any]) -> None:
        assert cache.boundary is not None
        self.cache, self.before = cache, cache.fork()
        first, self.rest = parted(kwargs, cache.boundary - cache.columns)
        try:
            self.head = decoder(**first)
        except BaseException:
            self.undo()
            raise

    @staticmethod
    def needed(cache: KVPolicyCache, columns: int) -> bool:
        return (
            cache.phase == "prompt"
            and cache.boundary is not None
            and cache.columns < cache.boundary < cache.columns + columns
        )

    def finish(self, output: Any) -> Any:
        """The output of one forward over all columns."""
        head = self.head
        output.last_hidden_state = torch.cat([head.last_hidden_state, output.last_hidden_state], 1)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(
                torch.cat(pair, 1)
                for pair in zip(head.hidden_states, output.hidden_states, strict=True)
            )
        return output

    def undo(self) -> None:
        self.cache.restore(self.before)
