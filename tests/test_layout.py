"""Guards of the layout: links, packaging, dependencies and what is loaded when."""

from __future__ import annotations

import ast
import email
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.support.imports import import_graph, modules

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "adapters")


def run_fresh(code: str, cwd: Path = ROOT) -> str:
    """Runs `code` in a fresh interpreter and returns what it printed."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph()


TOP_LEVEL = {
    "LICENSE", "MANIFEST.in", "Makefile", "README.md", "adapters", "constraints.txt", "docs",
    "examples", "kernels", "kvpolicy", "pyproject.toml", "tests",
}  # fmt: skip
# What git ignores, and what lies beside the project's own files on some machines.
BESIDE = {"bench", "build", "dist", "kvpolicy-demo.png", "shared"}


def test_the_top_level_has_no_other_entries():
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    found = {name for name in found if name != "__pycache__" and not name.endswith(".egg-info")}
    assert found - BESIDE == TOP_LEVEL


def test_a_plugin_that_warns_ends_no_run(tmp_path):
    """As pytest-benchmark does beside xdist; inside tests warnings are errors."""
    plugin, test = tmp_path / "pytest_other.py", tmp_path / "test_one.py"
    said = 'import warnings\n\ndef {}:\n    warnings.warn("busy")\n'
    plugin.write_text(said.format("pytest_configure(config)"))
    test.write_text(said.format("test_one()"))
    options = ["-n", "1", "-p", "pytest_other", "-p", "no:cacheprovider", "-c", "pyproject.toml"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", tmp_path, test],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["kernels", "adapters", "tests/kernels"])
def test_folder_is_no_regular_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("name", LINKS)
def test_link_resolves(name):
    link = ROOT / "kvpolicy" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_import_of_kvpolicy_is_light_and_hides_nothing_of_transformers():
    heavy = ["triton", "transformers", "accelerate", "datasets", "matplotlib", "rich", "typer"]
    out = run_fresh(
        "import warnings\n"
        "warnings.simplefilter('error')\n"
        "import sys, kvpolicy\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
        "print(kvpolicy.attach.__module__, kvpolicy.new_cache.__name__)\n"
        "print('transformers' in sys.modules)\n"
        # Found from the root, beside folders of names that transformers itself looks for.
        "from transformers import LlamaForCausalLM\n"
        "print(LlamaForCausalLM.__name__)"
    )
    wanted = ["[]", "kvpolicy.adapters.hf.attach new_cache", "True", "LlamaForCausalLM"]
    assert out.splitlines() == wanted


def test_the_root_names_what_it_exports():
    import kvpolicy

    tree = ast.parse((ROOT / "kvpolicy" / "__init__.py").read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    names = {alias.name for node in found for alias in node.names}
    assert sorted(names) == kvpolicy.__all__
    assert set(dir(kvpolicy)) == {*names, "__version__"}
    assert all(hasattr(kvpolicy, name) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        kvpolicy.atach  # noqa: B018


SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
# Modules of packages whose names differ.
MODULES = {"fa3-fwd": "fa3_fwd_interface", "lm-eval": "lm_eval"}
# What transformers requires, and so brings.
BROUGHT = {"huggingface_hub", "numpy", "packaging", "tokenizers", "tqdm", "yaml"}
# Not for users of the library: what baselines of the benchmark and tests need.
BASELINES = {"flashinfer"}


def packages(requirements: list[str]) -> set[str]:
    """The modules of required packages, kvpolicy's own extras resolved."""
    found = set()
    for text in requirements:
        name = re.match(r"[\w.-]+", text)[0]
        if name == "kvpolicy":
            for extra in re.search(r"\[(.*)\]", text)[1].split(","):
                found |= packages(EXTRAS[extra])
        else:
            found.add(MODULES.get(name, name))
    return found


EXTRAS = PROJECT["optional-dependencies"]
# What modules import; the others are for who works on the project or reads it.
USERS = {
    name: packages(found)
    for name, found in EXTRAS.items()
    if name not in ("dev", "docs", "notebooks")
}


def third_party(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Returns the modules that import each package from outside the library and Python."""
    found: dict[str, set[str]] = {}
    for name, targets in graph.items():
        for target in targets:
            top = target.split(".")[0]
            if top and top != "kvpolicy" and top not in sys.stdlib_module_names:
                found.setdefault(top, set()).add(name)
    return found


def test_requirements_are_what_is_imported(graph):
    required, optional = packages(PROJECT["dependencies"]), set().union(*USERS.values())
    found = set(third_party(graph))
    assert found - required - optional - BROUGHT - BASELINES == set()
    texts = [path.read_text(encoding="utf-8") for _, path in modules()]
    by_name = {name for name in required | optional if any(f'"{name}"' in x for x in texts)}
    assert (required | optional) - found - by_name == set(), "required and imported nowhere"


def guarded(tree: ast.AST, package: str) -> bool:
    """Whether each import of `package` stands in a `with extra(...)` that brings it."""
    allowed: set[ast.AST] = set()
    for node in ast.walk(tree):
        call = node.items[0].context_expr if isinstance(node, ast.With) else None
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "extra":
            if package in USERS[call.args[0].value]:
                allowed |= set(ast.walk(node))
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            allowed |= set(ast.walk(node))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        if any(name.split(".")[0] == package for name in names) and node not in allowed:
            return False
    return True


def test_a_missing_extra_is_named(graph):
    """Where the import stands, or in the package that it belongs to."""
    files = dict(modules())
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    entries = {"kvpolicy.cli": {"typer", "rich"}, "kvpolicy.training": {"accelerate"}}
    for package in set().union(*USERS.values()) - packages(PROJECT["dependencies"]):
        for name in third_party(graph).get(package, ()):
            part = ".".join(name.split(".")[:2])
            name = part if package in entries.get(part, ()) else name
            assert guarded(trees[name], package), f"{name} imports {package} without a hint"
    for part, wanted in entries.items():
        assert wanted <= set(third_party({part: graph[part]})), f"{part} does not look for {wanted}"


MISSING = {
    "accelerate": ("train", "import kvpolicy.training"),
    "matplotlib": ("plots", "from kvpolicy.bench.plots import draw; draw(None, [])"),
    "lm_eval": ("lm-eval", "import kvpolicy.adapters.lm_eval"),
    "vllm": ("vllm", "from kvpolicy.adapters.vllm import register; register()"),
    "gguf": ("eval", "from kvpolicy.evaluation.models.gguf_file import open_gguf; open_gguf('x')"),
}


def test_what_a_missing_package_says():
    out = run_fresh(
        "import sys\n"
        f"sys.modules |= dict.fromkeys({[*MISSING]})\n"
        f"for _, code in {[*MISSING.values()]}:\n"
        "    try:\n"
        "        exec(code)\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    says = [
        f"the package {name} is not installed; pip install 'kvpolicy[{extra}]' brings it"
        for name, (extra, _) in MISSING.items()
    ]
    assert out.splitlines() == says


def packaged_files() -> set[str]:
    """Returns the paths inside a wheel of every module and data file in the tree."""
    found = {name for path in (ROOT / "kvpolicy").rglob("*") if (name := _shipped(path))}
    for link in LINKS:
        found |= {f"kvpolicy/{name}" for p in (ROOT / link).rglob("*") if (name := _shipped(p))}
    return found


def _shipped(path: Path) -> str:
    inside = path.relative_to(ROOT)
    endings = (".packed.safetensors", ".tsv", ".json", ".md")
    data = "pretrained" in inside.parts and path.name.endswith(endings)
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
    gates = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kvpolicy").rglob("*.safetensors")}
    assert len(gates) == 4
    assert packaged_files() | gates <= files
    assert {"docs/changelog.md", "examples/demo.py", "constraints.txt"} <= files


def test_wheel_from_the_sdist_is_complete(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == packaged_files()
    assert {name.split("/")[1] for name in files} >= {*LINKS, "py.typed"}
    assert path.stat().st_size <= 5_000_000


def test_workflows_try_both_ends_of_the_ranges():
    folder = ROOT / ".github" / "workflows"
    flows = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in folder.glob("*.yml")}
    rows = flows["ci"]["jobs"]["suite"]["strategy"]["matrix"]["include"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("torch", "transformers"):
        (least,) = (re.search(r">=([\d.]+)", x)[1] for x in PROJECT["dependencies"] if name in x)
        newest = re.search(rf"^{name}==(\S+)", pinned, re.MULTILINE)[1]
        assert {f"{least}.0", newest} <= {row[name] for row in rows}
    minors = sorted(c.split(":: ")[-1] for c in PROJECT["classifiers"] if ":: 3." in c)
    assert sorted({row["python"] for row in rows}) == minors
    for flow, job in (("ci", "wheel"), ("release", "try")):
        assert flows[flow]["jobs"][job]["strategy"]["matrix"]["python"] == minors
        assert flows[flow]["jobs"][job]["steps"][-1]["run"] == ".ci/try-wheel"
    publish = flows["release"]["jobs"]["publish"]
    assert publish["needs"] == "try" and publish["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize("found", ["4.57.1", "5.16.2", "5.24.0", "5.24.0.dev0", "6.0"])
def test_another_transformers_is_refused_at_once(found, monkeypatch):
    from kvpolicy.adapters.hf import versions

    assert f"transformers>={versions.FROM},<{versions.BELOW}" in PROJECT["dependencies"]
    with monkeypatch.context() as patched:
        patched.setattr("transformers.__version__", found)
        with pytest.raises(
            ImportError, match=f"^transformers: wanted .*, got {found}; pip install"
        ):
            importlib.reload(versions)
    for served in ("5.17.0", "5.17.1.dev0", "5.23.4"):
        versions.check(served)


def test_wheel_says_who_where_and_which(built):
    """The version has one place, kvpolicy/__init__.py, and a citation that names it."""
    import kvpolicy

    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        says = email.message_from_bytes(archive.read(name))
    assert says["Version"] == kvpolicy.__version__
    assert says["Author"] == "kvpolicy developers"
    assert len(says.get_all("Project-URL")) == len(PROJECT["urls"]) == 4
    assert set(says.get_all("Provides-Extra")) == set(EXTRAS)
    minors = [c.split(":: ")[-1] for c in says.get_all("Classifier") if ":: 3." in c]
    assert minors == ["3.11", "3.12", "3.13"]
    assert says["Requires-Python"] == ">=3.11"
    citing = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    assert f"version = {{{kvpolicy.__version__}}}" in citing
    changes = (ROOT / "docs" / "changelog.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == kvpolicy.__version__


@pytest.mark.slow
def test_wheel_attaches_without_the_tree(built, tmp_path):
    """What .ci/try-wheel runs in an empty environment, with this one's packages."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['first_attach', {str(ROOT)!r}]\n"
        f"runpy.run_path({str(ROOT / '.ci' / 'first_attach.py')!r}, run_name='__main__')"
    )
    out = run_fresh(code, cwd=tmp_path)
    assert [line.split(":")[0] for line in out.splitlines()[:2]] == ["everything", "SnapKV"]
    assert out.rstrip().endswith("kvpolicy " + path.name.split("-")[1])


def test_wheel_imports_without_the_tree(built, tmp_path):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    out = run_fresh(
        "import kvpolicy, kvpolicy.kernels, kvpolicy.adapters.hf\n"
        "from kvpolicy import DuoAttention, WriteGate, pretrained\n"
        "print(kvpolicy.__file__)\n"
        "print(*kvpolicy.kernels.__path__)\n"
        "print(WriteGate.from_pretrained('smollm2-135m-instruct-w64-keep25').layers)\n"
        "print(len(DuoAttention.from_pretrained(pretrained.names()[0], sparsity=0.5).full_heads))\n"
        "print(*pretrained.names())",
        cwd=tmp_path,
    )
    assert out.split() == [
        str(tmp_path / "kvpolicy" / "__init__.py"),
        str(tmp_path / "kvpolicy" / "kernels"),
        "30",
        "30",
        "duo-smollm2-135m-instruct",
        "smollm2-135m-instruct-w64-keep25",
    ]
