"""The budgets of policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._base import Budget, not_a_budget
from .tokens import tokens_from_int


def budget_of(policy: Any) -> Budget | None:
    """A policy's budget, a plain int as Tokens; TypeError, naming the policy, for other values."""
    found = tokens_from_int(policy.budget)
    if found is not None and not isinstance(found, Budget):
        raise TypeError(f"{type(policy).__name__}.budget: {not_a_budget(found)}")
    return found


def bound_layers(policies: Mapping[int, Any]) -> list[tuple[Budget, list[int]]]:
    """Each budget of layers' policies once, with the layers that it binds."""
    found: list[tuple[Budget, list[int]]] = []
    for layer, policy in policies.items():
        budget = budget_of(policy)
        if budget is None:
            continue
        own = next((own for known, own in found if known == budget), None)
        if own is None:
            found.append((budget, [layer]))
        else:
            own.append(layer)
    return found


def check_budget(policy: Any, window: int) -> None:
    """Raises TypeError or ValueError, naming the policy, if its budget cannot hold a window."""
    budget = budget_of(policy)
    if budget is None:
        return
    try:
        budget.check(window)
    except ValueError as error:
        raise ValueError(f"{type(policy).__name__}.{error}") from error
