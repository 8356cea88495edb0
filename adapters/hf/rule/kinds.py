"""What each layer of a decoder keeps in a cache, as its config says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import attrs
from transformers import cache_utils

from ....errors import UnsupportedError

Kind = Literal["full", "sliding", "chunked", "linear", "conv", "hybrid", "shared", "none"]

# transformers' words for the kinds that are served. Its "dummy" is two kinds, told apart below.
_KINDS: dict[str, Kind] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "linear",
    "conv": "conv",
    "hybrid": "hybrid",
    "hybrid_sliding": "hybrid",
    "attention": "full",
}
_WITHOUT_CACHE = ("moe", "mlp")
# And for those that are not, with what is in the way.
REFUSED = {
    "indexed_attention": "an indexer of its own chooses which keys a query reads",
    "deepseek_sparse_attention": "an indexer of its own chooses which keys a query reads",
    "qwen_sparse_attention": "an indexer of its own chooses which keys a query reads",
    "compressed_sparse_attention": "it compresses its keys by itself",
    "heavily_compressed_attention": "it compresses its keys by itself",
    "minimax_m3_sparse": "an index of its own chooses which keys a query reads",
    "reference_sliding_attention": "it keeps its prompt whole and slides over generated tokens",
    "window_attention": "its windows do not overlap",
}


@attrs.frozen(kw_only=True)
class LayerKind:
    """What one layer keeps in a cache.

    Attributes:
        kind: "full": keys and values of all tokens. "sliding": of the last `window`. "chunked": of
            the query's chunk. "linear" and "conv": a state of transformers' own. "hybrid": a state,
            and keys and values of all tokens or of the last `window`. "shared": nothing; it reads
            another layer's keys. "none": nothing, as it has no attention.
        window: keys that a query sees, itself included; None where it sees all.
        chunk: a query at position `i` sees keys at `j <= i` with `j // chunk == i // chunk`.
        states: of a linear, convolutional or hybrid layer, states of transformers' own.
    """

    kind: Kind
    window: int | None = None
    chunk: int | None = None
    states: int = 0

    @property
    def attention(self) -> bool:
        """Whether it stores keys and values."""
        return self.kind in ("full", "sliding", "chunked", "hybrid")

    @property
    def own(self) -> bool:
        """Whether it keeps a state of transformers' own."""
        return self.kind in ("linear", "conv", "hybrid")


def text_config(config: Any) -> Any:
    """The config of the text decoder, which may be a part of a multimodal model's."""
    return config.get_text_config(decoder=True)


def layer_kinds(config: Any) -> tuple[LayerKind, ...]:
    """The kind of each decoder layer of a model with `config`, in order.

    Raises UnsupportedError for a kind that is not served, by transformers' name of it.
    """
    config = text_config(config)
    names, given = _names_and_arguments(config)
    written: Sequence[str] = getattr(config, "layer_types", None) or names
    # transformers 5.17 leaves layers out that read another's keys: they are the last ones.
    names = [*names, *["dummy"] * (len(written) - len(names))]
    arguments = [*given, *[{}] * (len(names) - len(given))]
    return tuple(
        _kind(layer, name, kept, config)
        for layer, (name, kept) in enumerate(
            zip(
                [
                    "none" if before in _WITHOUT_CACHE else name
                    for name, before in zip(names, written, strict=True)
                ],
                arguments,
                strict=True,
            )
        )
    )


def _names_and_arguments(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    names, given = cache_utils.get_layer_types_and_kwargs(config)
    names = list(names)
    # One dict for all layers up to transformers 5.18 or so, one for each since.
    arguments = [given] * len(names) if isinstance(given, dict) else list(given)
    return names, arguments


def _kind(layer: int, name: str, arguments: dict[str, Any], config: Any) -> LayerKind:
    if name in ("dummy", "none"):
        return LayerKind(kind="shared" if name == "dummy" else "none")
    kind = _KINDS.get(name)
    if kind is None:
        reason = REFUSED.get(name, "this kind is not known")
        raise UnsupportedError(
            f"model: layer {layer} of {type(config).__name__} is of kind {name!r}: {reason}"
        )
    states = int(arguments.get("number_of_states", 1)) if kind in ("linear", "conv") else 0
    if kind == "hybrid":
        states = int(arguments.get("number_of_states", 1))
    size = arguments.get("sliding_window")
    if name in ("sliding_attention", "hybrid_sliding"):
        return LayerKind(kind=kind, window=_size(layer, "sliding_window", size), states=states)
    if kind == "chunked":
        return LayerKind(kind=kind, chunk=_size(layer, "attention_chunk_size", size))
    return LayerKind(kind=kind, states=states)


def _size(layer: int, name: str, size: Any) -> int:
    if not isinstance(size, int) or size < 1:
        raise UnsupportedError(f"model: layer {layer} needs {name}, the config has {size!r}")
    return size
