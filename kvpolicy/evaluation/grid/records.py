"""What is known of a cell, and the one place that turns it into JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

#: Scores, each a number a context, in the order of tables.
SCORES = ("score", "accuracy", "exact", "log_likelihood", "loss", "hit_loss", "density")
TOO_SMALL = "cannot be this small"


@attrs.frozen(kw_only=True)
class Footprint:
    """What one sequence's cache holds, reads and takes, on average.

    Tokens are per head, the window included: held, seen, and read by the last token. `bytes` are
    all, `kv_bytes` those of keys and values, `slots` their places for tokens per head. `admitted`
    is a fraction; `evicted` counts tokens over all heads.
    """

    held_tokens: float
    seen_tokens: float
    read_tokens: float
    bytes: float
    kv_bytes: float
    slots: float
    admitted: float
    evicted: float

    @property
    def held(self) -> float:
        """Part of the tokens seen that a head holds."""
        return self.held_tokens / self.seen_tokens

    @property
    def read(self) -> float:
        """Part of the tokens seen that the last token read."""
        return self.read_tokens / self.seen_tokens


@attrs.frozen(kw_only=True)
class Measured:
    """What a composition did on a task: `scores` by name, each a number a context.

    Benchmarks add the numbers of the contexts, the KV footprint (entries stored times the steps
    that they stay, as a part of full attention's), the seconds to the first token for one context
    alone, how many tokens of a context were cut out, and how many a head holds after the answers.
    """

    scores: Mapping[str, tuple[float, ...]]
    footprint: Footprint
    seconds: float
    questions: int = 0
    contexts: tuple[int, ...] = ()
    kv_footprint: float | None = None
    first_token: float | None = None
    dropped: float | None = None
    held_after: float | None = None


@attrs.frozen(kw_only=True)
class Result:
    """A cell and what was measured in it.

    Or else why not: `skipped`, because the family cannot be that small, or `failed`, in which case
    a later run tries again.
    """

    task: str
    length: int
    variant: str
    family: str
    keep: float
    seed: int
    measured: Measured | None = None
    skipped: str = ""
    failed: str = ""

    @property
    def key(self) -> tuple[str, int, str]:
        """What no two results of a folder share."""
        return self.task, self.length, self.variant

    @property
    def reason(self) -> str:
        """Why nothing was measured."""
        return self.skipped or self.failed


def to_json(result: Result) -> dict[str, Any]:
    """One flat object."""
    found = attrs.asdict(result, filter=lambda field, _: field.name in _CELL)
    done = result.measured
    if done is None:
        return found | ({"failed": result.failed} if result.failed else {"skipped": result.skipped})
    found |= {name: list(values) for name, values in done.scores.items()}
    found |= {"questions": done.questions} if done.questions else {}
    found |= {"contexts": list(done.contexts)} if done.contexts else {}
    found |= {n: x for n in _OPTIONAL if (x := getattr(done, n)) is not None}
    return found | attrs.asdict(done.footprint) | {"seconds": done.seconds}


def from_json(found: Any) -> Result:
    """The result of an object that this or an earlier version wrote.

    Raises:
        ValueError: a field is missing or of another type.
    """
    if not isinstance(found, dict):
        raise ValueError(f"wanted the fields of a cell, got {type(found).__name__}")
    cell = {name: _read(found, name, kind) for name, kind in _CELL.items()}
    if "failed" in found:
        return Result(**cell, failed=_read(found, "failed", str))
    if "skipped" in found:  # version 0.1.0 wrote failures under this name too
        reason = _read(found, "skipped", str)
        return Result(**cell, **{"skipped" if reason == TOO_SMALL else "failed": reason})
    scores = {name: _values(found, name) for name in SCORES if name in found}
    if not scores:
        raise ValueError(f"wanted one of {', '.join(SCORES)}, skipped or failed, got none")
    sizes = {field.name: _read(found, field.name, float) for field in attrs.fields(Footprint)}
    measured = Measured(
        scores=scores,
        footprint=Footprint(**sizes),
        seconds=_read(found, "seconds", float),
        questions=_read(found, "questions", int) if "questions" in found else 0,
        contexts=_places(found),
        **{name: _read(found, name, float) for name in _OPTIONAL if name in found},
    )
    return Result(**cell, measured=measured)


_OPTIONAL = ("kv_footprint", "first_token", "dropped", "held_after")
_CELL: dict[str, type] = {
    "task": str,
    "length": int,
    "variant": str,
    "family": str,
    "keep": float,
    "seed": int,
}


def _read(found: dict[str, Any], name: str, kind: type) -> Any:
    value = found.get(name)
    kinds = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name}: wanted {kind.__name__}, got {value!r}")
    return value


def _places(found: dict[str, Any]) -> tuple[int, ...]:
    values = found.get("contexts", [])
    if not isinstance(values, list):
        raise ValueError(f"contexts: wanted a list of numbers, got {values!r}")
    return tuple(_read({"contexts": value}, "contexts", int) for value in values)


def _values(found: dict[str, Any], name: str) -> tuple[float, ...]:
    values = found[name]
    if not isinstance(values, list):
        raise ValueError(f"{name}: wanted a list of numbers, got {values!r}")
    return tuple(_read({name: value}, name, float) for value in values)
