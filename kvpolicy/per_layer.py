"""Different policies on different layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self, TypeVar, cast

import attrs
import torch
from torch import Tensor

from ._fields import shown
from .admission import Admission, Write
from .budget import budget_of
from .choices import When
from .eviction import Eviction, EvictionView
from .selection import PerPhase, PromptView, Reads, Selection

Policy = TypeVar("Policy", Admission, Selection, Eviction)
Layers = tuple[tuple[range, Any], ...]

_MOST_LAYERS = 1 << 16  # a range is spelled out, so its length is bounded first


def _spans(value: Mapping[int | range, Any] | Iterable[tuple[int | range, Any]]) -> Layers:
    spans: list[tuple[range, Any]] = []
    taken: set[int] = set()
    pairs: Any = value.items() if isinstance(value, Mapping) else value
    listed = isinstance(pairs, Iterable) and not isinstance(pairs, str | bytes)
    pairs = tuple(pairs) if listed else (pairs,)
    if not all(map(_is_pair, pairs)):
        raise TypeError(f"layers: wanted policies by layer, such as {{0: p}}, got {shown(value)}")
    for key, policy in pairs:
        if not isinstance(key, int | range) or isinstance(key, bool):
            raise TypeError(f"layers: wanted ints or ranges as keys, got {key!r}")
        span = key if isinstance(key, range) else range(key, key + 1)
        if not span or min(span[0], span[-1]) < 0:
            raise ValueError(f"layers: wanted layers counted from 0, got {shown(key)}")
        if max(span[0], span[-1]) >= _MOST_LAYERS:
            raise ValueError(f"layers: wanted layers below {_MOST_LAYERS:,}, got {shown(key)}")
        if twice := taken.intersection(span):
            raise ValueError(f"layers: layer {min(twice)} has two policies")
        taken.update(span)
        spans.append((span, policy))
    return tuple(spans)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


@attrs.frozen(kw_only=True)
class _PerLayer:
    _kind: ClassVar[type]

    default: Any
    layers: Layers = attrs.field(converter=_spans)

    def __attrs_post_init__(self) -> None:
        for name, policy in [("default", self.default), *(("layers", p) for _, p in self.layers)]:
            if not isinstance(policy, self._kind):
                raise TypeError(f"{name}: wanted {self._kind.__name__}, got {shown(policy)}")
        self._agree()

    def _agree(self) -> None:
        """Raises ValueError if the members cannot stand side by side."""

    @property
    def members(self) -> tuple[Any, ...]:
        """Each policy once, the default first."""
        return tuple({id(p): p for p in (self.default, *(p for _, p in self.layers))}.values())

    @property
    def neutral(self) -> bool:
        return all(p.neutral for p in self.members)

    def at(self, layer: int) -> Any:
        policy = next((p for span, p in self.layers if layer in span), self.default)
        return policy.at(layer)

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        for span, _ in self.layers:
            if max(span[0], span[-1]) >= layers:
                raise ValueError(f"layers: {span} goes beyond the model's {layers} layers")
        for policy in self.members:
            policy.check(layers, kv_heads, head_dim)

    def check_window(self, window: int) -> None:
        for policy in self.members:
            policy.check_window(window)

    def _map(self, change: Callable[[Any], Any]) -> Self:
        changed = {id(p): change(p) for p in self.members}
        layers = tuple((span, changed[id(p)]) for span, p in self.layers)
        return attrs.evolve(self, default=changed[id(self.default)], layers=layers)

    def _window(self) -> int | None:
        windows = sorted({p.window for p in self.members if p.window is not None})
        if len(windows) > 1:
            raise ValueError(
                f"layers: the policies' windows disagree: {windows}; give all the same"
            )
        return windows[0] if windows else None

    def _needs(self) -> frozenset[str]:
        return frozenset().union(*(p.needs for p in self.members))


@attrs.frozen(kw_only=True)
class PerLayerAdmission(_PerLayer, Admission):
    """An admission for each layer; made by `per_layer`."""

    _kind = Admission

    def _agree(self) -> None:
        self._window()

    @property
    def window(self) -> int | None:
        return self._window()

    @property
    def needs(self) -> frozenset[str]:
        return self._needs()

    @property
    def by_position(self) -> bool:
        return all(p.by_position for p in self.members)

    def admit(self, write: Write) -> Tensor:
        policy: Admission = self.at(write.layer)
        return policy.admit(write)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> PerLayerAdmission:
        return self._map(lambda p: p.place(device, dtype, backend))


@attrs.frozen(kw_only=True)
class PerLayerSelection(_PerLayer, Selection):
    """A selection for each layer; made by `per_layer`. Resolve `at` a layer to score and choose.

    All layers share the pages' summaries, so the members that choose pages are of one class;
    budgets, always-kept pages and group rules may differ, and what prompts read too.
    """

    _kind = Selection

    def _agree(self) -> None:
        choosing = (p.decode if isinstance(p, PerPhase) else p for p in self.members)
        names = sorted({type(p).__name__ for p in choosing if not p.neutral})
        if len(names) > 1:
            raise ValueError(
                f"layers: selections that read pages' summaries must be of one class, got {names}"
            )

    @property
    def tile(self) -> int | None:
        """The largest tile, a multiple of the others; None if all layers read everything."""
        return max((p.tile for p in self.members if p.tile is not None), default=None)

    @property
    def whole_prompt(self) -> bool:
        return any(p.whole_prompt for p in self.members)

    def prompt(self, view: PromptView) -> Reads:
        policy: Selection = self.at(view.layer)
        return policy.prompt(view)

    def summarize(self, keys: Tensor, valid: Tensor) -> Tensor:
        policy: Selection = next((p for p in self.members if not p.neutral), self.default)
        return policy.summarize(keys, valid)

    def score(self, query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        raise TypeError("PerLayerSelection: scores depend on the layer; use at(layer).score")

    def pages(self, window: int, page_size: int) -> int:
        raise TypeError("PerLayerSelection: budgets depend on the layer; use at(layer).pages")


@attrs.frozen(kw_only=True)
class PerLayerEviction(_PerLayer, Eviction):
    """An eviction for each layer; made by `per_layer`. `when` is "decode" if one layer's is."""

    _kind = Eviction

    def _agree(self) -> None:
        self._window()
        for policy in self.members:
            budget = budget_of(policy)
            if budget is not None and budget.spans_layers:
                raise ValueError(
                    f"layers: {budget} counts over all layers and cannot hold for some"
                )

    @property
    def window(self) -> int | None:
        return self._window()

    @property
    def needs(self) -> frozenset[str]:
        return self._needs()

    @property
    def when(self) -> When:
        acting = {p.when for p in self.members if not p.neutral}
        return "decode" if "decode" in acting else "prompt_end"

    @property
    def queries(self) -> int:
        return max(int(p.queries) for p in self.members)

    @property
    def query_stats(self) -> bool:
        return any(p.query_stats for p in self.members)

    @property
    def hidden(self) -> int:
        return max(int(p.hidden) for p in self.members)

    @property
    def output_weight(self) -> bool:
        return any(p.output_weight for p in self.members)

    @property
    def rope(self) -> bool:
        return any(p.rope for p in self.members)

    @property
    def prefers_window(self) -> int | None:
        return max((p.prefers_window for p in self.members if p.prefers_window), default=None)

    @property
    def forgets_window(self) -> bool:
        return any(p.forgets_window for p in self.members)

    @property
    def across_heads(self) -> bool:
        return any(p.across_heads for p in self.members)

    @property
    def gathers_heads(self) -> bool:
        return all(p.gathers_heads for p in self.members if p.across_heads)

    def number(self, write: Write) -> Tensor | None:
        policy: Eviction = self.at(write.layer)
        return policy.number(write)

    def mark(self, write: Write) -> Tensor | None:
        policy: Eviction = self.at(write.layer)
        return policy.mark(write)

    def admit(self, write: Write) -> Tensor | None:
        policy: Eviction = self.at(write.layer)
        return policy.admit(write)

    def score(self, view: EvictionView) -> Tensor:
        policy: Eviction = self.at(view.layer)
        if view.queries is not None and view.query_valid is not None:
            extra = max(view.queries.shape[2] - policy.queries, 0)
            view = view._replace(
                queries=view.queries[:, :, extra:], query_valid=view.query_valid[:, extra:]
            )
        if view.hidden is not None and view.hidden_valid is not None:
            extra = max(view.hidden.shape[1] - policy.hidden, 0)
            view = view._replace(
                hidden=view.hidden[:, extra:], hidden_valid=view.hidden_valid[:, extra:]
            )
        return policy.score(view)

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> PerLayerEviction:
        return self._map(lambda p: p.place(device, dtype, backend))


def per_layer(default: Policy, layers: Mapping[int | range, Policy]) -> Policy:
    """A policy that is `default` except on the named layers.

    Args:
        default: an admission, a selection or an eviction.
        layers: policies of the same slot by layer or range of layers, counted from 0.

    Raises:
        TypeError: policies of different slots, or a key that is no int or range.
        ValueError: a layer is negative or named twice; windows disagree; selections of different
            classes; a `TotalCap`, which spans layers.

    Example:
        `per_layer(Quest(budget=1024), {range(2): SelectAll()})`
    """
    for slot in (PerLayerAdmission, PerLayerSelection, PerLayerEviction):
        if isinstance(default, slot._kind):
            return cast(Policy, slot(default=default, layers=layers))
    raise TypeError(
        f"default: wanted an admission, a selection or an eviction, got {shown(default)}"
    )
