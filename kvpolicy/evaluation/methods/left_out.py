"""Policies that no comparison at equal bytes has, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

from .files import FROM_FILES, GATES, Given

#: Classes that are no method by themselves.
NO_METHOD: Mapping[str, str] = {
    "AdmitAll": "full attention",
    "SelectAll": "full attention",
    "KeepAll": "full attention",
    "AllOf": "puts admissions together",
    "AnyOf": "puts admissions together",
    "PerPhase": "puts selections together",
    "Ratio": "a number of tokens, by length",
}
#: Methods that cannot stand in the table.
NEVER: Mapping[str, str] = {
    "AdaEA": "its thresholds are tables for one sparsity, which no command of ours makes",
    "KVPress": "a press is an object of yours: --pipeline measures it",
    "LUKV": "its parts are a file for one scorer of the model, which no command of ours makes",
    "TotalCap": "a cap on a whole sequence, over heads as WG-KV has it: kvpolicy pareto turns it",
}


def left_out(given: Given) -> dict[str, str]:
    """Names and reasons, with those of methods that lack what they need."""
    found = {
        name: f'wants a file of the model: --file "{name}=FILE"'
        for name in (*FROM_FILES, *GATES)
        if name not in given.files
    }
    if given.gate is None:
        found["WriteGate"] = "wants a gate of the model: --gate FILE"
    if given.duo is None:
        found["DuoAttention"] = found["HeadKV"] = "wants a pattern of the model: --duo FOLDER"
    return found | dict(NEVER)
