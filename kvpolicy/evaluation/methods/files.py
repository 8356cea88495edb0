"""What methods need beside a budget: a gate, a pattern, and files of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from ...admission import KVzap, WriteGate
from ...admission._duo_file import read as read_pattern
from ...budget import Budget
from ...eviction import Eviction, FastKVzip, JudgeQ, QFilters, TriAttention, TrimKV

#: Evictions that are read from a file of the model, by name.
FROM_FILES: Mapping[str, type[Any]] = {
    "Q-Filters": QFilters,
    "Fast KVzip": FastKVzip,
    "TRIM-KV": TrimKV,
    "Judge Q": JudgeQ,
    "TriAttention": TriAttention,
}
#: Gates of other methods: an admission, and evictions by what they score.
GATES: Mapping[str, type[Any]] = {"KVzap": KVzap}


@attrs.frozen(kw_only=True)
class Given:
    """A write gate, the folder of a DuoAttention pattern, and files of other methods by name."""

    gate: WriteGate | None = None
    duo: Path | None = None
    files: Mapping[str, Path] = attrs.field(factory=dict)

    def gates(self) -> dict[str, Any]:
        """Admissions with a threshold that score tokens, by name."""
        own = {} if self.gate is None else {"write gate": self.gate}
        return own | {x: GATES[x].from_pretrained(y) for x, y in self.files.items() if x in GATES}

    def head_worths(self) -> list[list[float]] | None:
        """What heads are worth `[L][Hkv]`: the pattern's values, none below 0."""
        if self.duo is None:
            return None
        values, _ = read_pattern(Path(self.duo))
        return [[max(x, 0.0) for x in row] for row in values]

    def evicting(self, name: str, budget: Budget) -> Eviction:
        """The eviction that a file makes."""
        found: Eviction = FROM_FILES[name].from_pretrained(self.files[name], budget=budget)
        return found


def named_files(texts: Iterable[str]) -> dict[str, Path]:
    """Files of "NAME=FILE".

    Raises:
        ValueError: a text is no such pair, a method reads none, or a file is not there.
    """
    found: dict[str, Path] = {}
    for text in texts:
        name, _, file = text.partition("=")
        if name not in (*FROM_FILES, *GATES):
            names = ", ".join((*FROM_FILES, *GATES))
            raise ValueError(f"file: wanted METHOD=FILE with one of {names}, got {text!r}")
        if not Path(file).is_file():
            raise ValueError(f"file: wanted a file for {name}, got {file!r}")
        found[name] = Path(file)
    return found
