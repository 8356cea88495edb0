"""Guards of the rooms: every module has a layer, imports point down, and none go in a circle."""

from __future__ import annotations

import pytest

from tests.support.imports import import_graph, imports, modules, part_of

# Lowest first. A part of kvpolicy, a module or a folder, imports its own layer and those below it.
LAYERS = (
    ("errors", "choices", "_fields", "_extras", "_option"),
    ("_arguments", "_elsewhere", "_names", "_markdown", "_table", "_files"),
    ("_knob", "_pictures"),
    ("backend", "exchange", "pretrained"),
    ("ops", "rope"),
    ("reference", "kernels"),
    ("layer_sizes",),
    ("spec", "budget", "admission", "selection", "eviction", "per_layer", "_slots"),
    ("store",),
    ("calls",),
    ("pipeline",),
    ("testing",),
    ("pipeline_files",),
    ("adapters",),
    ("training", "evaluation", "bench"),
    ("cli",),
)
# The same inside folders, whose files import each other.
ROOMS = {
    "store": (
        ("sequence", "extents", "free_pages", "fingerprint", "lease", "ring", "report_table"),
        ("pool",),
        ("layer", "trimming", "recount"),
        ("devices",),
        ("state",),
        ("numbers", "moments", "checks", "page_contents"),
        ("sizes", "summaries", "page_counts"),
        ("allocate",),
        ("compaction", "rollback", "report", "plan", "persist"),
        ("fork", "report_ranks"),
        ("looked_back", "slots"),
        ("parking",),
    ),
    "calls": (
        ("_checks", "budgets", "decide", "due", "score", "select", "settle", "tell", "tiles"),
        ("evict",),
        ("capacity",),
        ("fit", "prompt_pages"),
        ("call", "prompt", "decode"),
    ),
}
POLICIES = ("admission", "selection", "eviction")
# Programs and experiments on real models; everything else outside adapters is the core.
OUTSIDE_CORE = ("adapters", "bench", "training", "evaluation", "cli")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, over others, itself (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[-len(group) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in graph:
        if name not in order:
            visit(name)
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph()


def offenders(graph: dict[str, set[str]], part: str, forbidden: set[str]) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, targets in graph.items()
        if part_of(name) == part
        for target in targets
        if part_of(target) in forbidden
    ]


@pytest.mark.parametrize(
    ("statement", "target"),
    [
        ("import kvpolicy.store", "kvpolicy.store"),
        ("from . import quest", "kvpolicy.selection.quest"),
        ("from .. import store", "kvpolicy.store"),
        ("from ..store.pool import Pool", "kvpolicy.store.pool"),
        ("def f():\n    from ..store import pool", "kvpolicy.store.pool"),
    ],
)
def test_imports_resolves(statement, target):
    assert target in imports(statement, "kvpolicy.selection._base", is_package=False)
    if ".." not in statement:
        assert target in imports(statement, "kvpolicy.selection", is_package=True)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d"}}) == [["b", "c"]]


def test_every_module_has_a_layer(graph):
    assert {part_of(name) for name in graph} - {""} == {p for layer in LAYERS for p in layer}
    for room, layers in ROOMS.items():
        files = {part_of(name, 2) for name in graph if part_of(name) == room} - {""}
        assert files == {file for layer in layers for file in layer}, room


@pytest.mark.parametrize("level", range(len(LAYERS)))
def test_imports_point_down(graph, level):
    above = {part for layer in LAYERS[level + 1 :] for part in layer}
    assert not [text for part in LAYERS[level] for text in offenders(graph, part, above)]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_inside_a_room(graph, room):
    level = {file: n for n, layer in enumerate(ROOMS[room]) for file in layer}
    own = {n: t for n, t in graph.items() if part_of(n) == room and part_of(n, 2)}
    bad = [
        f"{name} imports {target}"
        for name, targets in own.items()
        for target in targets
        if part_of(target) == room and level.get(part_of(target, 2), -1) > level[part_of(name, 2)]
    ]
    assert not bad


def test_no_circle(graph):
    """Modules only: a package's `__init__` gathers what its files hold, for others."""
    files = {name for name, path in modules() if path.name != "__init__.py"}
    assert circles({n: {t for t in graph[n] if t in files} - {n} for n in files}) == []


@pytest.mark.parametrize(("part", "other"), [("reference", "kernels"), ("kernels", "reference")])
def test_implementations_are_independent(graph, part, other):
    assert not offenders(graph, part, {other})


def test_only_the_backend_knows_implementations(graph):
    """By name, so that nothing is imported before it is used. Benchmarks time single kernels."""
    allowed = {"reference", "kernels", "bench"}
    bad = [
        text
        for part in {part_of(name) for name in graph} - allowed
        for text in offenders(graph, part, {"reference", "kernels"})
    ]
    assert not bad


@pytest.mark.parametrize("part", POLICIES)
def test_policies_do_not_know_the_store(graph, part):
    assert not offenders(graph, part, {"store", "calls"})


def test_core_does_not_know_transformers_or_adapters(graph):
    core = {name: targets for name, targets in graph.items() if part_of(name) not in OUTSIDE_CORE}
    bad = [
        f"{name} imports {target}"
        for name, targets in core.items()
        for target in targets
        if target.split(".")[0] == "transformers" or part_of(target) == "adapters"
    ]
    # The root offers what attaches to models, and loads it when it is asked for.
    assert [text for text in bad if not text.startswith("kvpolicy imports ")] == []


def test_only_kernels_import_triton(graph):
    """And the benchmark that counts their launches."""
    bad = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        if part_of(name) != "kernels" and name != "kvpolicy.bench.launch_counts"
        for target in targets
        if target.split(".")[0] == "triton"
    ]
    assert not bad
