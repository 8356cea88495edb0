"""Who imports whom in kvpolicy, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKS = ("kernels", "adapters")


def modules() -> Iterator[tuple[str, Path]]:
    """Yields (dotted name, file) of every module of kvpolicy, links included."""
    sources = {path: path.relative_to(ROOT) for path in (ROOT / "kvpolicy").rglob("*.py")}
    for link in LINKS:
        for path in (ROOT / link).rglob("*.py"):
            sources[path] = Path("kvpolicy") / path.relative_to(ROOT)
    for path, inside in sources.items():
        yield ".".join(inside.with_suffix("").parts).removesuffix(".__init__"), path


def imports(source: str, name: str, is_package: bool) -> set[str]:
    """Returns the dotted names that module `name` imports, at any depth of its code."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def part_of(name: str, depth: int = 1) -> str:
    """Returns `store` for kvpolicy.store.pool (`pool` at depth 2), "" where there is none."""
    parts = name.split(".")
    return parts[depth] if parts[0] == "kvpolicy" and len(parts) > depth else ""


def import_graph() -> dict[str, set[str]]:
    """Returns the dotted names that each module imports."""
    return {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for name, path in modules()
    }
