"""DuoAttention: some heads keep everything, the others sinks and a window."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from .._fields import check_int, check_number, is_a, not_negative, optional, positive, shown
from .._knob import Knob
from .._names import named
from . import _duo_file
from ._base import Admission, Write
from ._files import Source, find_folder, source_field, source_of

NOISE = 1e-6


def _rows(value: Iterable[Iterable[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in value)


def _given(value: Any) -> Any:
    """Rows as tuples; what has none is left to the validator."""
    try:
        return value if isinstance(value, str | bytes) else _rows(value)
    except TypeError:
        return value


def _pattern(instance: DuoAttention, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(row, tuple) for row in value):
        raise TypeError(f"full_heads: wanted a row of bools for each layer, got {shown(value)}")
    if not value or not value[0]:
        raise ValueError("full_heads: wanted a row of bools for each layer, got none")
    for layer, row in enumerate(value):
        if len(row) != len(value[0]):
            raise ValueError(
                f"full_heads: layer 0 has {len(value[0])} heads, layer {layer} has {len(row)}"
            )
        for head in row:
            if not isinstance(head, bool):
                raise TypeError(f"full_heads: wanted bools, got {shown(head)} in layer {layer}")


@named
@attrs.frozen(kw_only=True)
class DuoAttention(Admission):
    """Full heads admit every token, streaming heads only the first `sinks`.

    `full_heads[layer][head]` tells, for each KV head, whether it is full
    (mit-han-lab/duo-attention). This is WG-KV's masked form; `AtPromptEnd(DuoAttention(...))`
    prefills densely as the original does. The `window` includes the current token.

    Example:
        `CachePipeline(admission=DuoAttention.from_pretrained("attn_pattern", sparsity=0.5))`
    """

    full_heads: tuple[tuple[bool, ...], ...] = attrs.field(
        converter=_given, validator=_pattern, repr=lambda rows: f"<{len(rows)}x{len(rows[0])}>"
    )
    sinks: int = attrs.field(default=128, validator=not_negative)
    window: int = attrs.field(default=256, validator=positive)
    _mask: Tensor | None = attrs.field(  # set by `place`
        default=None, eq=False, repr=False, validator=optional(is_a(Tensor, "a tensor"))
    )
    source: Source | None = source_field()

    @property
    def sparsity(self) -> float:
        """The fraction of streaming heads."""
        heads = [head for row in self.full_heads for head in row]
        return 1 - sum(heads) / len(heads)

    @property
    def neutral(self) -> bool:
        return all(map(all, self.full_heads))

    @property
    def by_position(self) -> bool:
        return True

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        sinks: int | None = None,
        window: int | None = None,
        seed: int = 42,
        revision: str | None = None,
    ) -> DuoAttention:
        """Reads a pattern directory: `full_attention_heads.tsv` and `config.json`.

        Args:
            path_or_repo: the directory, the id of a hub repository, or a name of
                `kvpolicy.pretrained`.
            sparsity: fraction of streaming heads wanted; a head is full if its value is at least
                the quantile of all values there. Exactly one of `sparsity` and `threshold`.
            threshold: a head is full if its value, clipped to [0, 1], is at least this.
            sinks: overrides `sink_size` of config.json.
            window: overrides `recent_size` of config.json.
            seed: of the noise in [0, 1e-6) that breaks ties between values, as published; drawn by
                `numpy.random.RandomState(seed)`, whose stream is the same in every numpy.
            revision: branch, tag or commit of the hub repository.

        Raises:
            FileNotFoundError: the directory or one of its files is missing.
            ValueError: a file is malformed; the message names the place.
        """
        if (sparsity is None) == (threshold is None):
            raise ValueError(
                f"sparsity, threshold: wanted exactly one, got {sparsity!r} and {threshold!r}; "
                "write sparsity=0.5, the part of the heads that stream"
            )
        for name, value in (("sparsity", sparsity), ("threshold", threshold)):
            if value is not None:
                check_number(name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1)
        check_int("seed", seed, 0, (1 << 32) - 1)  # what RandomState takes
        files = (_duo_file.PATTERN, _duo_file.CONFIG)
        folder = find_folder(path_or_repo, files, revision)
        values, config = _duo_file.read(folder)
        chosen: dict[str, Any] = {"seed": seed}
        chosen |= {"threshold": threshold} if sparsity is None else {"sparsity": sparsity}
        return cls(
            full_heads=full_heads(values, sparsity, threshold, seed),
            sinks=config["sink_size"] if sinks is None else sinks,
            window=config["recent_size"] if window is None else window,
            source=source_of(folder, path_or_repo, None, revision, **chosen),
        )

    def admit(self, write: Write) -> Tensor:
        mask = torch.tensor(self.full_heads) if self._mask is None else self._mask
        full = mask[write.layer, write.heads.start : write.heads.stop]
        return full.to(write.positions.device)[:, None] | (write.positions < self.sinks)

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        found = {"layers": len(self.full_heads), "kv_heads": len(self.full_heads[0])}
        for name, wanted in {"layers": layers, "kv_heads": kv_heads}.items():
            if found[name] != wanted:
                raise ValueError(
                    f"DuoAttention: made for {name}={found[name]}, the model has {name}={wanted}"
                )

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> DuoAttention:
        return attrs.evolve(self, mask=torch.tensor(self.full_heads, device=device))

    def knob(self, pattern: str | os.PathLike[str] | None = None) -> Knob[Admission]:
        if pattern is None:
            raise ValueError("pattern: DuoAttention wants the folder of its head values, got None")
        read = partial(self.from_pretrained, pattern, sinks=self.sinks, window=self.window)
        return Knob(name="sparsity", at=lambda x: 1 - x, set=lambda x: read(sparsity=x))


def full_heads(
    values: Iterable[Iterable[float]],
    sparsity: float | None,
    threshold: float | None = None,
    seed: int = 42,
) -> tuple[tuple[bool, ...], ...]:
    """Binarises head values `[L][Hkv]` (mit-han-lab/duo-attention, `sparsify_attention_heads`)."""
    import numpy

    heads = numpy.clip(numpy.array(_rows(values), dtype=numpy.float64), 0.0, 1.0)
    if sparsity is None:
        assert threshold is not None
        return _rows((heads >= threshold).tolist())
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: wanted a number in [0, 1], got {sparsity}")
    if sparsity in (0, 1):
        return _rows(numpy.full(heads.shape, sparsity == 0).tolist())
    heads = heads + numpy.random.RandomState(seed).uniform(0.0, NOISE, heads.shape)
    return _rows((heads >= numpy.quantile(heads, sparsity)).tolist())
