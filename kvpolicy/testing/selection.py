"""Checking a selection."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import check_flag
from ..budget import budget_of
from ..ops import load
from ..pipeline import CachePipeline
from ..selection import Selection
from ..selection._base import GROUPS
from ..spec import CacheSpec
from . import _spy
from ._cache import decode, decoded, prompt, random_data
from ._common import (
    ConformanceError,
    check_equal,
    check_options,
    check_tensor,
    check_value,
    require,
    run,
)
from ._tiles import check_tiles

PAGES = 5


def check_selection(
    policy: Selection,
    *,
    layers: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    window: int = 8,
    dtype: torch.dtype = torch.float32,
    upper_bound: bool = False,
    takes_effect: bool | None = None,
    seed: int = 0,
) -> None:
    """Checks that a selection's summaries and scores are pure and that it limits what is read.

    Properties: frozen, comparable, options, runs, shape, dtype, device, inputs unchanged,
    stateless, no host sync, invalid slots, batch, no NaN, page order, other pages, heads, upper
    bound; in a pipeline: dense, cut, budget, fused, takes effect. For one with a `tile` also, of
    prompts: shape, stateless, heads, look-ahead and cut (unless `whole_prompt`), batch, takes
    effect. Runs on the CPU; the prompt is a few pages longer than the budget, and ten tiles long,
    so check a policy with a small one.

    Args:
        policy: the selection.
        layers: layers of the model; all are checked.
        kv_heads: KV heads.
        group: query heads per KV head.
        head_dim: channels of a key.
        page_size: tokens in a page.
        window: local window; less than the budget.
        dtype: of keys and queries.
        upper_bound: whether a page's score must be at least every q.k inside it, as Quest's is.
        takes_effect: whether less must be read than is stored; by default, unless `neutral`, and
            by prompts if it has a `tile`.
        seed: of the data.

    Raises:
        ConformanceError: a property is broken; the message names it.
        ValueError: the policy does not fit the sizes.
    """
    check_value(policy, Selection)
    check_options(
        dtype,
        takes_effect,
        seed,
        layers=layers,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        window=window,
    )
    check_flag("upper_bound", upper_bound)
    policy.check(layers, kv_heads, head_dim)
    rng = torch.Generator().manual_seed(seed)
    batch = 3
    keys = torch.randn(batch * kv_heads * PAGES, page_size, head_dim, generator=rng).to(dtype)
    query = torch.randn(batch, kv_heads, group, head_dim, generator=rng).to(dtype)
    counts = torch.randint(1, page_size + 1, (batch, kv_heads, PAGES), generator=rng).int()
    counts[0], counts[1] = page_size, 1
    members = [policy.at(layer) for layer in range(layers)]
    for at in members:
        _options(at, window, page_size)
        valid = torch.arange(page_size) < counts.view(-1, 1)
        summary = _summaries(at, keys, valid)
        _scores(at, query, summary.view(batch, kv_heads, PAGES, -1), counts)
        if upper_bound:
            _bound(at, query, keys, valid, summary)
    spec = CacheSpec(
        layers=layers, heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype,
        page_size=page_size,
    )  # fmt: skip
    effect = takes_effect if takes_effect is not None else not policy.neutral
    check_tiles(policy, members, spec, window, takes_effect is not False, seed)
    of_prompts = policy.tile is not None and policy.neutral
    _pipeline(policy, members, spec, window, effect and not of_prompts, seed)


def _options(policy: Selection, window: int, page_size: int) -> None:
    wanted = f"group to be one of {', '.join(GROUPS)}"
    require(policy.group in GROUPS, "options", policy, wanted, f"{policy.group!r}")
    for name in ("first", "last"):
        value = getattr(policy, name)
        partial = name == "last" and value == "partial"
        holds = partial or (isinstance(value, int) and value >= 0)
        require(holds, "options", policy, f"{name} to be a number of pages from 0", f"{value!r}")
    if not policy.neutral:
        pages = run(policy, policy.pages, window, page_size)
        holds = isinstance(pages, int) and pages >= 1
        require(holds, "options", policy, f"pages({window}, {page_size}) from 1", f"{pages!r}")
        budget = budget_of(policy)
        if budget is not None and budget.fixed is not None:
            most = -(-(budget.fixed - window) // page_size)
            wanted = f"pages({window}, {page_size}) of at most {most} for {budget}"
            require(pages <= max(most, 1), "budget", policy, wanted, f"{pages}")


def _summaries(policy: Selection, keys: Tensor, valid: Tensor) -> Tensor:
    def call(keys: Tensor, valid: Tensor) -> Tensor:
        result: Tensor = run(policy, policy.summarize, keys, valid)
        width = result.shape[-1] if isinstance(result, Tensor) and result.ndim else 0
        check_tensor(policy, result, "summarize (any S)", (len(keys), width), keys)
        return result.clone()

    wanted = call(keys, valid)
    if found := _spy.syncs(policy.summarize, keys, valid):
        raise ConformanceError("no host sync", policy, "device operations only", ", ".join(found))
    zeros = keys.masked_fill(~valid[..., None], 0.0)
    poisoned = keys.masked_fill(~valid[..., None], float("nan"))
    for content, filled in (("zeros", zeros), ("NaN", poisoned)):
        case = f"whatever lies in invalid slots ({content})"
        check_equal("invalid slots", policy, call(filled, valid), wanted, case)
    check_equal("stateless", policy, call(keys, valid), wanted, "as in the first call")
    alone = torch.cat([call(keys[i : i + 1], valid[i : i + 1]) for i in range(len(keys))])
    check_equal("batch", policy, alone, wanted, "summarize for each page alone")
    require(not wanted.isnan().any(), "no NaN", policy, "summaries without NaN", "NaN")
    return wanted


def _scores(policy: Selection, query: Tensor, summary: Tensor, counts: Tensor) -> None:
    def call(query: Tensor, summary: Tensor, counts: Tensor) -> Tensor:
        result: Tensor = run(policy, policy.score, query, summary, counts)
        check_tensor(policy, result, "score", (*query.shape[:3], summary.shape[2]), query)
        return result.clone()

    wanted = call(query, summary, counts)
    require(not wanted.isnan().any(), "no NaN", policy, "scores without NaN", "NaN")
    if found := _spy.syncs(policy.score, query, summary, counts):
        raise ConformanceError("no host sync", policy, "device operations only", ", ".join(found))
    check_equal("stateless", policy, call(query, summary, counts), wanted, "as in the first call")

    rows = [slice(i, i + 1) for i in range(len(query))]
    alone = torch.cat([call(query[r], summary[r], counts[r]) for r in rows])
    check_equal("batch", policy, alone, wanted, "score for each sequence alone")
    order = torch.arange(summary.shape[2] - 1, -1, -1)
    turned = call(query, summary[:, :, order], counts[:, :, order])[..., order]
    check_equal("page order", policy, turned, wanted, "in whatever order pages come")
    short = summary.shape[2] - 2
    fewer = call(query, summary[:, :, :short], counts[:, :, :short])
    check_equal("other pages", policy, fewer, wanted[..., :short], "without the last two pages")
    empty = counts.clone()
    empty[:, :, short:] = 0
    poisoned = summary.clone()
    poisoned[:, :, short:] = float("nan")
    result = call(query, poisoned, empty)[..., :short]
    check_equal("other pages", policy, result, wanted[..., :short], "beside empty pages of NaN")
    for head in range(query.shape[1]):
        part = slice(head, head + 1)
        result = call(query[:, part], summary[:, part], counts[:, part])
        check_equal("heads", policy, result, wanted[:, part], f"for KV head {head} alone")


def _bound(policy: Selection, query: Tensor, keys: Tensor, valid: Tensor, summary: Tensor) -> None:
    batch, heads, _, dim = query.shape
    counts = valid.sum(-1).view(batch, heads, PAGES)
    scores = policy.score(query, summary.view(batch, heads, PAGES, -1), counts)
    grouped = keys.view(batch, heads, 1, PAGES, -1, dim).double()
    logits = (grouped * query[:, :, :, None, None].double()).sum(-1)
    inside = valid.view(batch, heads, 1, PAGES, -1)
    best = logits.masked_fill(~inside, float("-inf")).amax(-1)
    slack = 64 * torch.finfo(query.dtype).eps * float(logits.abs().max())
    excess = float((best - scores.double()).max())
    wanted = "scores of at least the largest q.k in the page"
    require(excess <= slack, "upper bound", policy, wanted, f"one that is {excess:.3g} lower")


def _pipeline(
    policy: Selection,
    members: list[Selection],
    spec: CacheSpec,
    window: int,
    effect: bool,
    seed: int,
) -> None:
    pipeline = CachePipeline(selection=policy, window=window, backend="reference")
    dense = CachePipeline(window=window, backend="reference")
    size = spec.page_size
    budgets = [at.pages(window, size) if not at.neutral else PAGES for at in members]

    full = window + size * min(budgets)
    steps = min(3, full - 1)
    low = full - steps
    data = random_data(spec, [low, max(low // 2, 1)], steps, 1, seed)
    outs, wants = (decode(p, prompt(p, data, low), data) for p in (pipeline, dense))
    for result, wanted in zip(outs, wants, strict=True):
        case = "as in dense attention, the budget holding all"
        check_equal("dense", policy, result, wanted, case)

    length = window + size * (max(budgets) + 4) - size // 3
    data = random_data(spec, [length, length - size], steps, 1, seed + 1)
    part = length if policy.whole_prompt else size + 3
    state, other = prompt(pipeline, data, length), prompt(pipeline, data, part)
    outs, cut = decode(pipeline, state, data), decode(pipeline, other, data)
    for result, wanted in zip(cut, outs, strict=True):
        case = f"as in one call, the prompt in calls of {part}"
        check_equal("cut", policy, result, wanted, case)

    found = pipeline.report(state)
    for index, (at, pages) in enumerate(zip(members, budgets, strict=True)):
        if at.neutral:
            continue
        layer, most = state.layers[index], window + pages * size
        read = max(found.read[index])
        limit = f"at most {most} tokens read in layer {index}"
        require(read <= most, "budget", policy, limit, f"{read}")
        if effect:
            stored = min(found.stored[index])
            limit = f"less read than the {stored} tokens stored (else say takes_effect=False)"
            require(read < stored, "takes effect", policy, limit, f"{read}")
        if layer.selected is not None:
            query = decoded(data, index, steps - 1)["query"][:, :, 0]
            amount = layer.selected.shape[-1]
            given = (layer.pool.pages, layer.heads, query, amount)
            chosen = Selection.select(at, load("reference"), *given)
            case = "from select, the pages that score chooses"
            check_equal("fused", policy, layer.selected, chosen, case)
    holds = not effect or any(not at.neutral for at in members)
    require(holds, "takes effect", policy, "a selection that is not neutral", "a neutral one")
