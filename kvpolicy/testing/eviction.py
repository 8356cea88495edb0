"""Checking an eviction."""

from __future__ import annotations

from typing import get_args

import torch

from .._arguments import optional
from .._fields import check_int
from ..budget import budget_of
from ..choices import Accumulates, NumberGroup
from ..eviction import Eviction, EvictionView
from ..eviction._base import WHEN
from ..spec import CacheSpec
from ._asked import asked, everything
from ._common import (
    ConformanceError,
    check_equal,
    check_options,
    check_tensor,
    check_value,
    require,
    run,
)
from ._evicting import check_in_pipeline
from ._views import one_head, one_row, poisoned, random_view, widened
from .admission import check_decisions, check_needs, make_batch

_ASKS = "options that ask for all that score reads"


def check_eviction(
    policy: Eviction,
    *,
    layers: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    hidden: int = 24,
    window: int | None = None,
    tokens: int | None = None,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    takes_effect: bool | None = None,
    seed: int = 0,
) -> None:
    """Checks that an eviction scores what is stored and nothing else, and that memory is freed.

    Properties: frozen, comparable, options, needs, runs, shape, dtype, device, inputs unchanged,
    asks, no NaN, stateless, invalid slots, batch, heads, and those of an admission for `mark`; in a
    pipeline: fused, counted once, cut, batch, window, frees pages, budget, neutral, takes effect.
    Runs on the CPU.

    Args:
        policy: the eviction.
        layers: layers of the model; all are checked.
        kv_heads: KV heads.
        group: query heads per KV head.
        head_dim: channels of a key.
        hidden: channels of the attention input.
        window: local window; default the policy's own, else 8.
        tokens: prompt length in the pipeline; default a few pages more than the budget or window.
        page_size: tokens in a page.
        dtype: of keys, values and queries.
        takes_effect: whether tokens must be evicted; by default, unless `neutral`.
        seed: of the data.

    Raises:
        ConformanceError: a property is broken; the message names it.
        ValueError: the policy does not fit the sizes.
    """
    check_value(policy, Eviction)
    check_options(
        dtype,
        takes_effect,
        seed,
        layers=layers,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        hidden=hidden,
        page_size=page_size,
    )
    optional(check_int, "window", window, 1)
    optional(check_int, "tokens", tokens, 1)
    policy.check(layers, kv_heads, head_dim)
    check_needs(policy, policy.needs)
    placed = policy.place(torch.device("cpu"), dtype, "reference")
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "hidden": hidden}
    if window is None:
        window = policy.window or 8
    for layer in range(layers):
        at = placed.at(layer)
        _options(at)
        view = random_view(
            layer, at.queries, kv_heads, group, head_dim, window, dtype, seed,
            numbers=bool(at.numbered or at.accumulates or at.remembers),
        )  # fmt: skip
        view = asked(at, view, kv_heads * group, hidden, seed)
        full = everything(at, view, kv_heads * group, hidden, seed)
        _runs(at, view, full)
        _scores(at, view, full)
        batch = make_batch(layer, 40, sizes, at.needs, dtype, seed)
        if run(policy, at.mark, batch[0]) is not None:
            check_decisions(at, at.mark, batch)  # type: ignore[arg-type]
        if at.numbered and run(policy, at.number, batch[0]) is not None:
            check_decisions(at, at.number, batch, None)  # type: ignore[arg-type]
    spec = CacheSpec(
        layers=layers, heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
        page_size=page_size, hidden=hidden,
    )  # fmt: skip
    effect = takes_effect if takes_effect is not None else not policy.neutral
    check_in_pipeline(policy, spec, window, tokens, hidden, effect, seed)


def _options(policy: Eviction) -> None:
    wanted = f"when to be one of {', '.join(WHEN)}"
    require(policy.when in WHEN, "options", policy, wanted, f"{policy.when!r}")
    holds = isinstance(policy.queries, int) and policy.queries >= 0
    require(holds, "options", policy, "queries from 0", f"{policy.queries!r}")
    holds = policy.accumulates in (None, *get_args(Accumulates))
    require(holds, "options", policy, "accumulates None, sum or max", f"{policy.accumulates!r}")
    holds = not policy.accumulates or policy.group in get_args(NumberGroup)
    require(holds, "options", policy, "group mean, max or sum", f"{policy.group!r}")
    for name in ("query_skip", "hidden"):
        value = getattr(policy, name)
        holds = isinstance(value, int) and value >= 0
        require(holds, "options", policy, f"{name} from 0", f"{value!r}")
    try:
        budget_of(policy)
    except TypeError:
        wanted, got = "budget to be None, a Budget or tokens", repr(policy.budget)
        raise ConformanceError("options", policy, wanted, got) from None


def _runs(policy: Eviction, view: EvictionView, full: EvictionView) -> None:
    """What does not run on what it asks for, but where all is held, did not ask."""
    try:
        found, got = policy.score(view), "None"
    except Exception as error:
        found, got = None, str(error)
    if found is None:
        try:
            more = policy.score(full)
        except Exception:
            return  # it does not run at all; the next check says so
        require(more is None, "asks", policy, _ASKS, got)


def _scores(policy: Eviction, view: EvictionView, full: EvictionView) -> None:
    def call(view: EvictionView) -> torch.Tensor:
        result: torch.Tensor = run(policy, policy.score, view)
        check_tensor(policy, result, "score", tuple(view.valid.shape), view.keys)
        wanted = "scores without NaN, in invalid slots too"
        require(not result.isnan().any(), "no NaN", policy, wanted, "NaN")
        return result.clone()

    wanted, valid = call(view), view.valid
    holds = not bool((wanted[valid] == float("inf")).any())
    require(holds, "no NaN", policy, "finite scores or -inf", "inf")
    check_equal("stateless", policy, call(view), wanted, "as in the first call")

    check_equal("asks", policy, call(full), wanted, f"({_ASKS}) where more is held")

    hide = ~valid
    clean = wanted.masked_fill(hide, 0.0)
    result = call(poisoned(view)).masked_fill(hide, 0.0)
    case = "whatever lies in slots, window and queries that are not valid"
    check_equal("invalid slots", policy, result, clean, case)
    result = call(widened(view, 7))[..., : valid.shape[2]].masked_fill(hide, 0.0)
    check_equal("invalid slots", policy, result, clean, "however wide the view is padded")

    for row in range(len(valid)):
        result = call(one_row(view, row)).masked_fill(hide[row : row + 1], 0.0)
        check_equal("batch", policy, result, clean[row : row + 1], f"for sequence {row} alone")
    for head in range(0 if policy.across_heads else valid.shape[1]):
        part = slice(head, head + 1)
        result = call(one_head(view, head)).masked_fill(hide[:, part], 0.0)
        check_equal("heads", policy, result, clean[:, part], f"for KV head {head} alone")
