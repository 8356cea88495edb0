"""Checking an admission."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..admission import Admission, Write
from . import _spy
from ._common import (
    ConformanceError,
    check_equal,
    check_options,
    check_tensor,
    check_value,
    require,
    run,
)
from ._writes import join, part, scaled, sequence, shard

NEEDS = frozenset({"key_pre", "hidden"})


def check_admission(
    policy: Admission,
    *,
    layers: int = 2,
    kv_heads: int = 3,
    head_dim: int = 16,
    hidden: int = 24,
    tokens: int = 40,
    dtype: torch.dtype = torch.float32,
    takes_effect: bool | None = None,
    seed: int = 0,
) -> None:
    """Checks that an admission decides per token, causally and without state; runs on the CPU.

    Properties: frozen, comparable, needs, runs, shape, dtype, device, inputs unchanged, stateless,
    no host sync, causal, batch, pack order, cut, heads, no NaN, neutral, takes effect.

    Args:
        policy: the admission.
        layers: layers of the model; all are checked.
        kv_heads: KV heads; shards of them are checked too.
        head_dim: channels of a key.
        hidden: channels of the attention input.
        tokens: length of the longest sequence.
        dtype: of keys and values.
        takes_effect: whether random data must be admitted in part; by default, unless `neutral`.
        seed: of the data.

    Raises:
        ConformanceError: a property is broken; the message names it.
        ValueError: the policy does not fit the sizes.
    """
    check_value(policy, Admission)
    check_options(
        dtype,
        takes_effect,
        seed,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=hidden,
        tokens=tokens,
    )
    policy.check(layers, kv_heads, head_dim)
    check_needs(policy, policy.needs)
    placed = policy.place(torch.device("cpu"), dtype, "reference")
    sizes = {"kv_heads": kv_heads, "head_dim": head_dim, "hidden": hidden}
    decisions = []
    for layer in range(layers):
        at = placed.at(layer)
        batch = make_batch(layer, tokens, sizes, policy.needs, dtype, seed)
        decisions += (found := check_decisions(policy, at.admit, batch))
        wanted = "neutral only if every token is admitted"
        holds = not at.neutral or all(bool(d.all()) for d in found)
        require(holds, "neutral", policy, wanted, f"a dropped token in layer {layer}")
    if takes_effect if takes_effect is not None else not policy.neutral:
        every = torch.cat(decisions, 1)
        rate = float(every.float().mean())
        wanted = f"some of {every.numel()} random tokens admitted (else say takes_effect=False)"
        require(0 < rate < 1, "takes effect", policy, wanted, "all" if rate else "none")


def check_needs(policy: object, needs: frozenset[str]) -> None:
    """`needs` names inputs that exist."""
    known = isinstance(needs, frozenset) and needs <= NEEDS
    require(known, "needs", policy, f"a frozenset within {sorted(NEEDS)}", f"{needs!r}")


def make_batch(
    layer: int,
    tokens: int,
    sizes: dict[str, int],
    needs: frozenset[str],
    dtype: torch.dtype,
    seed: int,
) -> list[Write]:
    """Three sequences of different lengths; the second continues at a later position."""
    lengths, starts = (tokens, max(tokens // 3, 1), 1), (0, 1000, 0)
    return [
        sequence(n, layer=layer, needs=needs, dtype=dtype, start=start, seed=seed * 10 + i, **sizes)
        for i, (n, start) in enumerate(zip(lengths, starts, strict=True))
    ]


def check_decisions(
    policy: object,
    decide: Callable[[Write], Tensor],
    batch: list[Write],
    dtype: torch.dtype | None = torch.bool,
) -> list[Tensor]:
    """Checks what every decision at write time must keep; returns each sequence's decisions.

    Without a `dtype` they are floats, equal up to rounding.
    """

    def call(write: Write) -> Tensor:
        result: Tensor = run(policy, decide, write)
        check_tensor(policy, result, decide.__name__, write.key.shape[:2], write.key, dtype)
        return result.clone()

    first, tokens = batch[0], batch[0].key.shape[1]
    wanted = [call(write) for write in batch]
    for _ in range(2):
        case = "as in the first call with the same tokens"
        check_equal("stateless", policy, call(first), wanted[0], case)
    if found := _spy.syncs(decide, first):
        raise ConformanceError("no host sync", policy, "device operations only", ", ".join(found))

    other = call(scaled(batch[0], -3.0))
    check_equal("stateless", policy, call(first), wanted[0], "whatever was decided in between")

    low = tokens // 2
    rest = scaled(part(first, low, tokens), -3.0)
    mixed = join([part(first, 0, low), rest])._replace(cu_seqlens=first.cu_seqlens)
    case = f"whatever the tokens from {low} on are"
    check_equal("causal", policy, call(mixed)[:, :low], wanted[0][:, :low], case)

    together = torch.cat(wanted, 1)
    case = "as for the sequence alone"
    check_equal("batch", policy, call(join(batch)), together, case)
    poisoned = [first, *(scaled(write, float("nan")) for write in batch[1:])]
    result = call(join(poisoned))[:, :tokens]
    check_equal("batch", policy, result, wanted[0], "whatever the other sequences hold")
    case = "wherever the sequence lies in the pack"
    result = call(join(batch[::-1]))
    check_equal("pack order", policy, result, torch.cat(wanted[::-1], 1), case)

    for size in (max(tokens // 3, 1), 1):
        spans = [(low, min(low + size, tokens)) for low in range(0, tokens, size)]
        result = torch.cat([call(part(first, *span)) for span in spans], 1)
        check_equal("cut", policy, result, wanted[0], f"as in one call, in calls of {size}")
    steps = [call(join([part(w, 0, 1) for w in batch]))]
    ones = torch.cat([d[:, :1] for d in wanted], 1)
    check_equal("cut", policy, steps[0], ones, "as in one call, one token of each sequence")

    heads = first.key.shape[0]
    for low, high in [(0, 1), (1, heads)] if heads > 1 else []:
        result = call(shard(first, low, high))
        case = f"as with all heads, for KV heads {low} to {high - 1} alone"
        check_equal("heads", policy, result, wanted[0][low:high], case)

    for factor in (0.0, 100.0):
        if found := _spy.nan_comparisons(decide, scaled(first, factor)):
            case = f"decisions without NaN for tokens times {factor:g}"
            raise ConformanceError("no NaN", policy, case, ", ".join(found))
    return [*wanted, other]
