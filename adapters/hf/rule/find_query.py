"""Finds how the queries of a layer before RoPE are had, and by how much RoPE turns them."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from .find_pre_rope import Search
from .pre_rope import per_pair
from .records import PreRope, Rotation
from .watched import Watched


def find_query(
    seen: Watched, query: Tensor, key: PreRope | str, *, clips: bool = False
) -> PreRope | str:
    """How to get the queries before RoPE, or why there is no way.

    `query` `[B, Hq, S, D]` is what the layer attended with, `key` how its keys are had. Queries
    that are scaled or normed after the rotation are rotated back as they are, so that turning them
    again gives what attends.
    """
    if isinstance(key, str):
        return key
    if key.form == "same":
        return key
    assert key.rotation is not None
    search = Search(seen, query)
    turns, factor = measured(search, key.rotation)
    rotation = attrs.evolve(key.rotation, turns=turns, factor=factor)
    found = search.direct(query) or search.fused(query)
    if found is not None and found.form == "same":
        return found
    if found is not None and found.form == "module" and not clips:
        assert found.rotation is not None
        own = attrs.evolve(found.rotation, turns=turns, factor=factor)
        return attrs.evolve(found, rotation=own)
    if search.axes:
        return "its RoPE has several axes, and no submodule puts its queries out"
    weights = [p for name in search.producers(query) for p in seen.modules[name].parameters()]
    if weights:
        return "its queries are normed by weights after the rotation"
    return PreRope(form="rotate_back", rotation=rotation)


def measured(search: Search, rotation: Rotation) -> tuple[tuple[float, ...], float]:
    """By how much each pair of channels turns from one position to the next, and the factor.

    Nothing where positions have several axes.
    """
    found = [a for k, m, a in search.angles if (k, m) == (rotation.keyword, rotation.module)]
    if not found or search.axes:
        return (), 1.0
    cos, sin = (per_pair(x, rotation)[0, 0].double() for x in found[0])  # [S, R / 2]
    if len(cos) < 2:
        return (), 1.0
    turn = torch.atan2(sin, cos)
    step = (turn.diff(dim=0) + torch.pi) % (2 * torch.pi) - torch.pi
    # The angle at the last position is the most exact, once it is known how often it went round.
    whole = turn[0] + step.sum(0)
    each = (whole - turn[0]) / (len(cos) - 1)
    factor = float(torch.hypot(cos, sin).mean())
    return tuple(each.tolist()), factor
