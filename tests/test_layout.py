"""Guards of the layout: links, packaging and the direction of imports."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "adapters")

# Lowest first. A layer imports its own layer and those below it.
LAYERS = (
    ("ops", "backend"),
    ("reference", "kernels"),
    ("admission", "selection", "eviction", "store"),
    ("pipeline",),
    ("adapters",),
)
POLICIES = ("admission", "selection", "eviction")
# Programs and experiments on real models; everything else outside adapters is the core.
OUTSIDE_CORE = ("adapters", "bench", "training", "evaluation", "cli")


def run_fresh(code: str, cwd: Path = ROOT) -> str:
    """Runs `code` in a fresh interpreter and returns what it printed."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


def part_of(name: str) -> str:
    """Returns `store` for kvpolicy.store.pages, "" for a name outside kvpolicy."""
    return (name.split(".") + [""])[1] if name.startswith("kvpolicy.") else ""


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for name, path in modules()
    }
    parts = {part_of(name) for name in found}
    assert {part for layer in LAYERS for part in layer} <= parts, "LAYERS names a missing part"
    return found


def offenders(graph: dict[str, set[str]], part: str, forbidden: set[str]) -> list[str]:
    return [
        f"{name} imports {target}"
        for name, targets in graph.items()
        if part_of(name) == part
        for target in targets
        if part_of(target) in forbidden
    ]


@pytest.mark.parametrize("folder", ["kernels", "adapters", "tests/kernels"])
def test_folder_is_no_regular_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("name", LINKS)
def test_link_resolves(name):
    link = ROOT / "kvpolicy" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_transformers_imports_from_the_root():
    out = run_fresh(
        "import transformers\n"
        "from transformers import LlamaForCausalLM\n"
        "print(LlamaForCausalLM.__name__)"
    )
    assert out.split() == ["LlamaForCausalLM"]


def test_import_of_kvpolicy_is_light():
    out = run_fresh(
        "import sys, kvpolicy\n"
        "print([name for name in ('triton', 'transformers') if name in sys.modules])"
    )
    assert out.strip() == "[]"


@pytest.mark.parametrize(
    ("statement", "target"),
    [
        ("import kvpolicy.store", "kvpolicy.store"),
        ("from . import quest", "kvpolicy.selection.quest"),
        ("from .. import store", "kvpolicy.store"),
        ("from ..store.pages import Pool", "kvpolicy.store.pages"),
        ("def f():\n    from ..store import pages", "kvpolicy.store.pages"),
    ],
)
def test_imports_resolves(statement, target):
    assert target in imports(statement, "kvpolicy.selection._base", is_package=False)
    if ".." not in statement:
        assert target in imports(statement, "kvpolicy.selection", is_package=True)


@pytest.mark.parametrize("level", range(len(LAYERS)))
def test_imports_point_down(graph, level):
    above = {part for layer in LAYERS[level + 1 :] for part in layer}
    assert not [text for part in LAYERS[level] for text in offenders(graph, part, above)]


@pytest.mark.parametrize(("part", "other"), [("reference", "kernels"), ("kernels", "reference")])
def test_implementations_are_independent(graph, part, other):
    assert not offenders(graph, part, {other})


def test_only_the_backend_loads_implementations(graph):
    """By name, of what `ops` says; the benchmarks time single kernels."""
    own = ("reference", "kernels", "backend", "bench")
    parts = {part_of(name) for name in graph} - {*own}
    assert not [x for part in parts for x in offenders(graph, part, {"reference", "kernels"})]


@pytest.mark.parametrize("part", POLICIES)
def test_policies_do_not_know_the_store(graph, part):
    assert not offenders(graph, part, {"store"})


def test_core_does_not_know_transformers_or_adapters(graph):
    core = {name: targets for name, targets in graph.items() if part_of(name) not in OUTSIDE_CORE}
    bad = [
        f"{name} imports {target}"
        for name, targets in core.items()
        for target in targets
        if target.split(".")[0] == "transformers" or part_of(target) == "adapters"
    ]
    assert not bad


def test_only_kernels_import_triton(graph):
    """And the benchmark that counts their launches."""
    bad = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        if part_of(name) != "kernels" and name != "kvpolicy.bench.launches"
        for target in targets
        if target.split(".")[0] == "triton"
    ]
    assert not bad


def packaged_files() -> set[str]:
    """Returns the paths inside a wheel of every module and data file in the tree."""
    found = {name for path in (ROOT / "kvpolicy").rglob("*") if (name := _shipped(path))}
    for link in LINKS:
        found |= {f"kvpolicy/{name}" for p in (ROOT / link).rglob("*") if (name := _shipped(p))}
    return found


def _shipped(path: Path) -> str:
    inside = path.relative_to(ROOT)
    data = "pretrained" in inside.parts and path.suffix in {
        ".safetensors",
        ".tsv",
        ".json",
        ".pt",
        ".md",
    }
    is_shipped = path.is_file() and (path.suffix == ".py" or path.name == "py.typed" or data)
    return inside.as_posix() if is_shipped else ""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Builds the sdist from a copy of the tree, and the wheel from the sdist alone."""
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=skip)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(folder / "tree")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_sdist_holds_real_files(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    assert packaged_files() <= files


def test_wheel_from_the_sdist_is_complete(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == packaged_files()
    assert {name.split("/")[1] for name in files} >= {*LINKS, "py.typed"}


def test_wheel_imports_without_the_tree(built, tmp_path):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    out = run_fresh(
        "import kvpolicy, kvpolicy.kernels, kvpolicy.adapters.hf\n"
        "print(kvpolicy.__file__)\n"
        "print(*kvpolicy.kernels.__path__)",
        cwd=tmp_path,
    )
    assert out.split() == [
        str(tmp_path / "kvpolicy" / "__init__.py"),
        str(tmp_path / "kvpolicy" / "kernels"),
    ]
