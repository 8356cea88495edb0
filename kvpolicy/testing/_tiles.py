"""Checking what a selection says of prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pipeline import CachePipeline
from ..selection import PromptView, Reads, Selection
from ..selection._prompt import checked
from ..spec import CacheSpec
from ._cache import prompt, random_data
from ._common import ConformanceError, check_equal, require, run

TILES = 10


def check_tiles(
    policy: Selection,
    members: list[Selection],
    spec: CacheSpec,
    window: int,
    effect: bool,
    seed: int,
) -> None:
    """The rules of `Selection.prompt`, for each layer whose policy has a tile."""
    for layer, at in enumerate(members):
        if at.tile is not None:
            _views(at, layer, at.tile, spec, seed)
    tile = policy.tile
    if tile is not None:
        _pipeline(policy, members, spec, tile, window, effect, seed)


def tokens_read(reads: Reads, view: PromptView, tile: int) -> Tensor:
    """Whether each tile reads each token up to its end, bool `[Hs, N, M * tile]`."""
    found = reads.blocks.repeat_interleave(tile, -1)
    if reads.columns is not None:
        columns = reads.columns.expand(-1, reads.blocks.shape[1], -1).long()
        inside = (columns >= 0) & (columns < found.shape[-1])
        more = torch.zeros(*found.shape[:-1], found.shape[-1] + 1, dtype=torch.bool)
        more.scatter_(2, torch.where(inside, columns, found.shape[-1]), True)
        found = found | more[..., :-1]
    end = torch.tensor([(n + 1) * tile for n in view.tiles(tile)])
    return found & (torch.arange(found.shape[-1]) < end[:, None])


def _views(policy: Selection, layer: int, tile: int, spec: CacheSpec, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    length = TILES * tile - tile // 3
    query, key = (
        torch.randn(heads, length, spec.head_dim, generator=rng).to(spec.dtype)
        for heads in (spec.heads, spec.kv_heads)
    )
    present = torch.rand(spec.kv_heads, length, generator=rng) < 0.7

    def ask(begin: int, end: int, heads: slice = slice(None)) -> Tensor:
        """What the tiles of the queries from `begin` to `end` read, of all KV heads or one."""
        ids = range(spec.kv_heads)[heads]
        group = spec.heads // spec.kv_heads
        own = query[ids.start * group : ids.stop * group, begin:end]
        there = present[heads, :end]
        keys = key[heads, :end].masked_fill(~there[..., None], 0)
        view = PromptView(layer, ids, own, begin, keys, there, spec.head_dim**-0.5)
        reads = run(policy, policy.prompt, view)
        try:
            reads = checked(type(policy).__name__, reads, view, tile)
        except (TypeError, ValueError) as error:
            wanted, _, got = str(error).partition(", got ")
            raise ConformanceError("shape", policy, wanted, got) from error
        found = tokens_read(reads, view, tile)
        return found.repeat_interleave(own.shape[0] // found.shape[0], 0)

    whole = ask(0, length)
    check_equal("stateless", policy, ask(0, length), whole, "as in the first call")
    for head in range(spec.kv_heads):
        group = spec.heads // spec.kv_heads
        part = slice(head * group, (head + 1) * group)
        alone = ask(0, length, slice(head, head + 1))
        check_equal("heads", policy, alone, whole[part], f"for KV head {head} alone")
    if policy.whole_prompt:
        return
    for cut in (1, TILES // 2, TILES - 1):
        end = cut * tile
        case = f"in the first {cut} tiles of {tile}, whatever comes after them"
        check_equal("look-ahead", policy, ask(0, end), whole[:, :cut, :end], case)
        case = f"from tile {cut} on, in a call that begins there"
        check_equal("cut", policy, ask(end, length), whole[:, cut:], case)


def _pipeline(
    policy: Selection,
    members: list[Selection],
    spec: CacheSpec,
    tile: int,
    window: int,
    effect: bool,
    seed: int,
) -> None:
    pipeline = CachePipeline(selection=policy, window=window, backend="reference")
    length = TILES * tile - tile // 3
    data = random_data(spec, [length, length - tile], 0, 1, seed)
    outs: list[list[Tensor]] = []
    state = prompt(pipeline, data, length, outs)
    found = pipeline.report(state).prompt_read
    for layer, at in enumerate(members):
        part = found[layer]
        if at.tile is not None and effect:
            limit = f"less than all blocks of prompts read in layer {layer}"
            less = part is not None and part < 1
            require(
                less, "takes effect", policy, f"{limit} (else say takes_effect=False)", f"{part}"
            )
    alone: list[list[Tensor]] = []
    prompt(pipeline, data.row(1), length, alone)
    for both, one in zip(outs[0], alone[0], strict=True):
        check_equal(
            "batch", policy, both[:, length:], one, "from a batch and from a sequence alone"
        )
    if policy.whole_prompt:
        return
    cut: list[list[Tensor]] = []
    prompt(pipeline, data, 3 * tile, cut)
    for layer, want in enumerate(outs[0]):
        rows = [[], []]  # type: ignore[var-annotated]
        for call, low in zip(cut, range(0, length, 3 * tile), strict=True):
            first = min(low + 3 * tile, length) - low
            for row, part in enumerate(call[layer].split([first, call[layer].shape[1] - first], 1)):
                rows[row].append(part)
        got = torch.cat([*rows[0], *rows[1]], 1)
        case = f"as in one call, the prompt in calls of {3 * tile}, which ends tiles"
        check_equal("cut", policy, got, want, case)
