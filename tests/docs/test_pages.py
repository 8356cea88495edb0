"""Pages that link to what is there, name what exists, and become a site without a warning."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvpolicy
from tests.support.docs import FENCE, ROOT, blocks, pages

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#{1,3} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in pages()])
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {path or page.name} has no #{anchor}"


def test_every_page_is_in_the_site() -> None:
    listed = []
    for index in (DOCS / "index.md", DOCS / "api/index.md"):
        for code in re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(), re.DOTALL):
            names = [line for line in code.splitlines() if line and not line.startswith(":")]
            listed += [(index.parent / f"{name}.md").resolve() for name in names]
    written = {p for p in DOCS.glob("**/*.md") if "measurements" not in p.parts}
    assert set(listed) == written - {DOCS / "index.md"}
    assert len(listed) == len(set(listed))


def listed() -> list[str]:
    return [
        name
        for block in blocks("{eval-rst}")
        for name in re.findall(r"^\.\. auto\w+:: (\S+)$", block.code, re.MULTILINE)
    ]


def described() -> set[str]:
    return set(listed())


@pytest.mark.parametrize(
    "room", ["kvpolicy", "kvpolicy.adapters.hf", "kvpolicy.testing", "kvpolicy.training"]
)
def test_the_reference_has_every_public_name(room: str) -> None:
    module = importlib.import_module(room)
    source = Path(module.__file__).read_text(encoding="utf-8")
    names = set(re.findall(r"^\s*from \S+ import \w+ as ([A-Za-z]\w*)", source, re.MULTILINE))
    elsewhere = {"attach", "new_cache"} if room == "kvpolicy" else set()
    assert names
    assert {f"{room}.{name}" for name in names - elsewhere} <= described()


def test_the_reference_names_what_exists() -> None:
    assert len(listed()) == len(described())
    for name in described():
        room, _, thing = name.rpartition(".")
        assert hasattr(importlib.import_module(room), thing), name


@pytest.mark.parametrize("sign", ["|", "*"])
def test_docstrings_have_no_markup_by_accident(sign: str) -> None:
    """Outside code a bar begins a substitution and a star begins emphasis, which Sphinx reports."""
    begins = re.compile(rf"(?<![\w{re.escape(sign)}]){re.escape(sign)}(?=[^\s{re.escape(sign)}])")
    for name in described():
        room, _, thing = name.rpartition(".")
        found = getattr(importlib.import_module(room), thing)
        inside = vars(found).items() if isinstance(found, type) else ()
        members = [x for key, x in inside if not key.startswith("_")]
        for text in filter(None, (inspect.getdoc(x) for x in (found, *members))):
            assert not begins.search(re.sub(r"`[^`]*`", "", text)), name


def test_pictures_are_as_drawn() -> None:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "pictures/draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = (DOCS / "how-it-works.md").read_text(encoding="utf-8")
    for name, draw in module.PICTURES.items():
        assert (DOCS / "pictures" / name).read_text(encoding="utf-8") == draw(), name
        assert f"(pictures/{name})" in shown


def test_the_readme_is_short() -> None:
    (code,) = [block.code for block in blocks("python") if block.page == "README.md"]
    assert len(code.splitlines()) <= 12
    assert len(README.splitlines()) <= 90
    assert len(re.findall(r"^\| ---", README, re.MULTILINE)) == 1
    assert README.count("![") == 1


def test_the_readme_shows_every_row_of_the_demo() -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples/demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    names = [row.name for row in demo.compositions()]
    shown = re.findall(r"^\| ([^|]+?) +\|", README, re.MULTILINE)
    assert [name for name in shown if name != "---"] == names


def test_examples_exist() -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", (DOCS / "examples.md").read_text(), re.MULTILINE)
    assert set(listed) == {path.name for path in ROOT.glob("examples/*.py")}


def test_errors_in_the_table_are_the_codes() -> None:
    sources = [p for d in ("kvpolicy", "adapters") for p in (ROOT / d).rglob("*.py")]
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", p.read_text(encoding="utf-8")) for p in sources)
    shown = (DOCS / "limits.md").read_text(encoding="utf-8")
    for phrase, told in {
        "check {check!r} failed": "check 'handle' failed",
        "the model has {name}=": "the model has layers=",
        "wanted at least window + 1 = ": "wanted at least window + 1 = ",
        "the parts of the pipeline disagree": "the parts of the pipeline disagree",
        "wanted a 2D mask of real tokens": "wanted a 2D mask of real tokens",
        "an attached model serves inference only; detach it to train": "inference only; detach it",
        "the attached model is running in another thread": "is running in another thread",
        "kernels need a CUDA device": "backend='triton' on device cpu",
    }.items():
        assert phrase in code, phrase
        assert told in shown, told


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(package)
    out = tmp_path / kvpolicy.__version__
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(DOCS), str(out)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f'href="{kvpolicy.__version__}/index.html"' in (tmp_path / "index.html").read_text()
    assert "writegate" in (out / "searchindex.js").read_text(encoding="utf-8").lower()
    for page in DOCS.glob("*.md"):
        assert (out / f"{page.stem}.html").is_file(), page.name
