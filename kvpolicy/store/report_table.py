"""A report as a table that a person reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from .._table import Section, Table, part, size, spans

# Field of a report, and what a person calls it.
BYTES = {
    "pages": "  in pages",
    "ring": "  in local windows",
    "kv": "keys and values, held",
    "positions": "positions of tokens",
    "summaries": "summaries of pages",
    "queries": "queries observed",
    "numbers": "numbers of tokens",
    "statistics": "statistics of queries, inputs",
    "states": "states of other layers",
    "tables": "page tables, counters",
    "reserved": "reserved, empty",
    "total": "everything",
}
RARE = ("numbers of tokens", "states of other layers")  # shown where there are any
SLOTS = ("admission", "selection", "eviction")


class Reported(Protocol):
    """What a table needs of a `Report`."""

    @property
    def dense(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def admitted(self) -> list[list[float] | None]: ...
    @property
    def stored(self) -> list[list[float]]: ...
    @property
    def evicted(self) -> list[list[int]]: ...
    @property
    def read(self) -> list[list[float]]: ...
    @property
    def prompt_read(self) -> list[float | None]: ...
    @property
    def sliding_layers(self) -> list[int]: ...
    @property
    def policies(self) -> dict[str, dict[str, list[int]]]: ...
    @property
    def shared_pages(self) -> int: ...
    @property
    def overshoot(self) -> int: ...
    @property
    def cap_evicted(self) -> int: ...
    @property
    def floored(self) -> list[int]: ...
    @property
    def kv(self) -> int: ...
    @property
    def mean_stored(self) -> float: ...
    @property
    def devices(self) -> Mapping[str, int]: ...
    @property
    def ranks(self) -> Sequence[Any]: ...


def report_table(report: Reported) -> Table:
    """Bytes by kind beside dense attention's, tokens a head, and where which policy acted."""
    layers, heads = len(report.stored), sum(map(len, report.stored))
    sequences = _count(report.sequences, "sequence")
    title = (
        f"cache of {sequences}, {report.tokens:,} tokens; "
        f"{_count(layers, 'layer')}, {_count(heads, 'KV head')}"
    )
    sections = [_bytes(report), _tokens(report), _policies(report)]
    if report.devices:
        rows = [(name, f"{n:,}", part(n, report.kv)) for name, n in report.devices.items()]
        sections.append(Section(heads=("devices", "bytes held", "of all"), rows=rows))
    if report.ranks:
        sections.append(_ranks(report))
    notes = [*_notes(report)]
    if notes:
        sections.append(Section(heads=("noted", ""), rows=notes, wide=True))
    return Table(title=title, sections=sections)


def _bytes(report: Reported) -> Section:
    found = {name: getattr(report, field) for field, name in BYTES.items()}
    rows = [
        (name, f"{count:,}", size(count), part(count, report.dense))
        for name, count in {"keys and values, dense": report.dense, **found}.items()
        if count or name not in RARE
    ]
    return Section(heads=("memory", "bytes", "", "of dense"), rows=rows)


def _tokens(report: Reported) -> Section:
    """Of one KV head and sequence."""
    rows: list[tuple[str, ...]] = [("seen", _plain(report.tokens / max(report.sequences, 1)))]
    admitted = [x for layer in report.admitted if layer is not None for x in layer]
    if admitted:
        rows.append(("admitted", *(f"{x:.1%}" for x in _spread(admitted))))
    evicted = [x / max(report.sequences, 1) for layer in report.evicted for x in layer]
    for name, values in (
        ("held", _flat(report.stored)),
        ("read by the last token", _flat(report.read)),
        ("evicted", evicted),
    ):
        rows.append((name, *map(_plain, _spread(values))))
    return Section(heads=("tokens of a head", "mean", "least", "most"), rows=rows)


def _ranks(report: Reported) -> Section:
    """Keys and values of each rank: the fullest one says how long all take."""
    rows = [
        (f"rank {n}", f"{x.kv:,}", part(x.kv, report.kv), _plain(x.mean_stored))
        for n, x in enumerate(report.ranks)
    ]
    return Section(heads=("ranks", "bytes held", "of all", "tokens of a head"), rows=rows)


def _policies(report: Reported) -> Section:
    managed = [n for n in range(len(report.stored)) if n not in report.sliding_layers]
    rows = []
    for slot in SLOTS:
        found = report.policies.get(slot, {})
        for name, on in found.items():
            rows.append((slot, f"{name} on {_where(on, managed)}: {_effect(report, slot, on)}"))
        if not found:
            rows.append((slot, "none"))
    if report.sliding_layers:
        layers = _layers(report.sliding_layers)
        verb = "slides" if len(report.sliding_layers) == 1 else "slide"
        rows.append(("no policy", f"on {layers}, which {verb} over a window of the model's"))
    return Section(heads=("policies", ""), rows=rows, wide=True)


def _notes(report: Reported) -> Iterable[tuple[str, str]]:
    floored = [n for n, count in enumerate(report.floored) if count]
    if floored:
        yield "budget", f"below the window, which was kept instead, on {_layers(floored)}"
    if report.shared_pages:
        yield "forks", f"{_count(report.shared_pages, 'page')} shared"
    if report.cap_evicted:
        yield "cap", f"{_count(report.cap_evicted, 'token')} evicted because it was reached"
    if report.overshoot:
        yield "overshoot", f"{_count(report.overshoot, 'token')} over max_tokens in a prompt call"


def _effect(report: Reported, slot: str, on: list[int]) -> str:
    """What a slot's policy did on its layers."""
    if slot == "admission":
        admitted = [x for n in on for x in report.admitted[n] or ()]
        return f"admitted {sum(admitted) / len(admitted):.1%} of the tokens"
    if slot == "eviction":
        heads = sum(len(report.evicted[n]) for n in on) * max(report.sequences, 1)
        dropped = sum(sum(report.evicted[n]) for n in on)
        return f"evicted {_plain(dropped / heads)} tokens of a head"
    parts = [x for n in on if (x := report.prompt_read[n]) is not None]
    prompts = f"prompts read {sum(parts) / len(parts):.1%} of their blocks" if parts else ""
    held, read = ([x for n in on for x in rows[n]] for rows in (report.stored, report.read))
    if prompts and held == read:
        return prompts
    means = [_plain(sum(values) / len(values)) for values in (read, held)]
    return f"{prompts and prompts + ', '}the last token read {means[0]} of {means[1]}"


def _where(on: list[int], managed: list[int]) -> str:
    if on == managed:
        return "all layers"
    missing = [n for n in managed if n not in on]
    if len(missing) < len(on):
        return f"all layers but {spans(missing)}"
    return _layers(on)


def _layers(numbers: list[int]) -> str:
    return f"{'layer' if len(numbers) == 1 else 'layers'} {spans(numbers)}"


def _flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


def _spread(values: list[float]) -> tuple[float, float, float]:
    return sum(values) / len(values), min(values), max(values)


def _plain(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
