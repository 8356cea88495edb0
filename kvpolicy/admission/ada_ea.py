"""AdaEA: admit what queries of a training set are expected to look at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from .._fields import is_a, not_negative, optional, positive
from .._files import read_named, read_pt, write_safetensors
from .._names import named
from ._base import Admission, Write
from ._files import Source, find_file, located, source_field

TILE = 256  # tokens of a product
PARTS = ("mean", "covariance", "thresholds")


def _tensor() -> Any:
    return attrs.field(repr=False, validator=is_a(Tensor, "a tensor"))


@named
@attrs.frozen(kw_only=True, eq=False)
class AdaEA(Admission):
    """Admits a token if the logit that some query head of its group is expected to give exceeds
    the head's threshold.

    The logit of a key k (after RoPE) is m.k / sqrt(D) + k'Ck / (2 D), with the mean `mean`
    `[L, Hkv, G, D]` and covariance `covariance` `[L, Hkv, G, D, D]` of queries, turned by the mean
    rotation of far positions; `thresholds` `[L, Hkv, G]`. The first `sinks` positions are always
    admitted.

    The adaptive expected-attention baseline of WG-KV (EMCLab-Sinica/WG-KV,
    utils/gather_adaea_stats/gather.py). Its code takes generated tokens for the first of a prompt
    and admits them all; here all tokens are decided alike, by their true position.

    Example:
        `CachePipeline(admission=AdaEA.from_pretrained("stats", sparsity=0.75))`
    """

    mean: Tensor = _tensor()
    covariance: Tensor = _tensor()
    thresholds: Tensor = _tensor()
    sinks: int = attrs.field(default=4, validator=not_negative)
    window: int | None = attrs.field(default=256, validator=optional(positive))
    source: Source | None = source_field()

    def __attrs_post_init__(self) -> None:
        found = tuple(self.mean.shape)
        shapes: dict[str, tuple[int, ...]] = {
            "mean": found if self.mean.ndim == 4 else (0,),
            "covariance": (*found, *found[-1:]),
            "thresholds": found[:-1],
        }
        for name, shape in shapes.items():
            x: Tensor = getattr(self, name)
            if tuple(x.shape) != shape or not x.is_floating_point():
                sizes = "[L, Hkv, G, D]" if name == "mean" else list(shape)
                raise ValueError(f"{name}: wanted floats {sizes}, got {x.dtype} {list(x.shape)}")

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        file: str | None = None,
        *,
        sparsity: float | None = None,
        sinks: int = 4,
        window: int | None = 256,
        revision: str | None = None,
    ) -> AdaEA:
        """Reads WG-KV's statistics and the thresholds beside them, or a file by `save`.

        Args:
            path_or_repo: a directory or hub repository that holds `query_stats.pt` and the tables
                of a sparsity, or a `.safetensors` file.
            file: the file of statistics in the directory or repository.
            sparsity: whose tables to read, such as 0.75 for `0.75_threshold.tsv` and
                `0.75_retain_ratio.tsv`; None for a file by `save`.
            sinks: positions that are always admitted.
            window: local window in tokens; None: any.
            revision: branch, tag or commit of the hub repository.

        Raises:
            ValueError: a file is damaged, or they do not fit each other.
        """
        options: dict[str, Any] = {"sinks": sinks, "window": window}
        if sparsity is None:
            path, source = located(path_or_repo, file, revision)
            parts = read_named(path, *PARTS)
            return cls(**{**options, **parts}, source=source)
        path = find_file(path_or_repo, file or "query_stats.pt", revision)
        thresholds, kept = (
            _table(find_file(path_or_repo, f"{sparsity}_{name}.tsv", revision))
            for name in ("threshold", "retain_ratio")
        )
        layers, heads = kept.shape
        if thresholds.shape[0] != layers or thresholds.shape[1] % heads:
            raise ValueError(
                f"{path}: wanted thresholds of each query head of {layers} layers with {heads} KV "
                f"heads, got {list(thresholds.shape)}"
            )
        mean, covariance = _statistics(read_pt(path), str(path))
        if mean.shape[:2] != thresholds.shape:
            wanted, found = list(thresholds.shape), list(mean.shape[:2])
            raise ValueError(f"{path}: wanted statistics of [L, Hq] = {wanted}, got {found}")
        split = (heads, -1)
        return cls(
            mean=mean.unflatten(1, split), covariance=covariance.unflatten(1, split),
            thresholds=thresholds.unflatten(1, split), **options,
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes statistics and thresholds to one `.safetensors` file."""
        write_safetensors(Path(path), {name: getattr(self, name) for name in PARTS}, {})

    def scores(self, write: Write) -> Tensor:
        """Expected logits `[Hkv, G, T]` in float32 at least.

        Products have one shape for 1 and for 4096 tokens: others would be rounded by shape.
        """
        _, tokens, dim = write.key.shape
        rows = slice(write.heads.start, write.heads.stop)
        wide = torch.promote_types(write.key.dtype, torch.float32)
        mean = self.mean[write.layer, rows].to(wide) / dim**0.5  # [Hkv, G, D]
        square = self.covariance[write.layer, rows].to(wide) / (2 * dim)
        tiles = F.pad(write.key, (0, 0, 0, -tokens % TILE)).unflatten(1, (-1, TILE))
        found = write.key.new_empty(*mean.shape[:2], tiles.shape[1], TILE, dtype=wide)
        for number, tile in enumerate(tiles.unbind(1)):
            k = tile.to(wide)[:, None]  # [Hkv, 1, TILE, D]
            found[:, :, number] = ((k @ square + mean[:, :, None]) * k).sum(-1)
        return found.flatten(2)[..., :tokens]

    def admit(self, write: Write) -> Tensor:
        rows = slice(write.heads.start, write.heads.stop)
        limits = self.thresholds[write.layer, rows, :, None]
        wanted = (self.scores(write) > limits.to(self.mean.device)).any(1)
        return wanted | (write.positions < self.sinks)

    def check(self, layers: int, kv_heads: int, head_dim: int) -> None:
        wanted, found = [layers, kv_heads, head_dim], [*self.mean.shape[:2], self.mean.shape[3]]
        if found != wanted:
            raise ValueError(f"mean: wanted [L, Hkv, D] = {wanted} of the model, got {found}")

    def place(self, device: torch.device, dtype: torch.dtype, backend: str) -> AdaEA:
        return attrs.evolve(self, **{name: getattr(self, name).to(device) for name in PARTS})


def _table(path: Path) -> Tensor:
    """Numbers `[L, H]` of a table with a row a layer."""
    try:
        rows = [[float(x) for x in line.split()] for line in path.read_text().splitlines() if line]
        found = torch.tensor(rows)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: wanted a row of numbers a layer: {error}") from None
    if found.ndim != 2 or not found.isfinite().all():
        raise ValueError(f"{path}: wanted finite numbers [L, H], got {list(found.shape)}")
    return found


def _statistics(state: object, source: str) -> tuple[Tensor, Tensor]:
    """Means `[L, Hq, D]` and covariances `[L, Hq, D, D]` of WG-KV's file."""
    names = ("mean_query", "cov_query")
    if not isinstance(state, Mapping) or set(state) != set(names):
        raise ValueError(f"{source}: wanted the keys {' and '.join(names)}")
    try:
        mean, covariance = (torch.stack([x.float() for x in state[name]]) for name in names)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{source}: wanted a tensor a layer: {error}") from None
    if mean.ndim != 3 or covariance.shape != (*mean.shape, mean.shape[-1]):
        found = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise ValueError(f"{source}: wanted [L, Hq, D] and [L, Hq, D, D], got {found}")
    return mean, covariance
