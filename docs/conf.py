"""Settings of the documentation's site: `make docs` builds it, without a network."""

from __future__ import annotations

import html
import inspect
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes

import kvpolicy

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "kvpolicy"
copyright = "the authors of kvpolicy"
version = release = kvpolicy.__version__
html_title = f"kvpolicy {version}"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["measurements"]

# Pages are markdown with GitHub's anchors; docstrings are Google's, with code in single backticks.
myst_heading_anchors = 3
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
python_display_short_literal_types = True

# Types of other packages, those that only type checkers import, and rooms that the reference
# leaves out.
_OTHERS = r"(abc|collections|os|pathlib|random|torch|transformers|weakref)\..*"
_UNSEEN = r"(PreTrained\w+|Path|Tensor|Texts|Progress|Objective|Kind|FloorForm)"
_ROOMS = r"_\w+|budget|calls|eviction|exchange|layer_sizes|ops|per_layer|rope|spec|store|training"
_SOME = r"adapters\.hf|admission\.(combine|_files)|selection\._prompt|evaluation\.(sessions|tasks)"
_INSIDE = rf"kvpolicy\.({_ROOMS}|{_SOME})\..*"
nitpick_ignore_regex = [("py:.*", name) for name in (_OTHERS, _UNSEEN, _INSIDE)]

html_theme = "furo"
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_sidebars = {
    "**": [
        "sidebar/scroll-start.html",
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/navigation.html",
        "versions.html",
        "sidebar/scroll-end.html",
    ]
}


def list_versions(app: Sphinx, failure: Exception | None) -> None:
    """Lists the versions that lie beside this one, each in a folder of its own."""
    if failure is not None or app.builder.name != "html":
        return
    above = Path(app.outdir).parent
    found = sorted(path.parent.name for path in above.glob("*/index.html"))
    names = [html.escape(name) for name in found]
    links = "".join(f'<li><a href="{name}/index.html">{name}</a></li>\n' for name in names)
    text = f"<h1>kvpolicy</h1>\n<p>Versions of the documentation:</p>\n<ul>\n{links}</ul>\n"
    head = "<!doctype html>\n<meta charset='utf-8'>\n<title>kvpolicy</title>\n"
    head += "<meta name='viewport' content='width=device-width'>\n"
    (above / "index.html").write_text(head + text, encoding="utf-8")


def link_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Sends links to files that are no pages to the repository."""
    settings = tomllib.loads((Path(app.srcdir).parent / "pyproject.toml").read_text("utf-8"))
    tree = f"{settings['project']['urls']['Homepage']}/tree/main"
    source[0] = re.sub(r"\]\(\.\./", f"]({tree}/", source[0])
    source[0] = re.sub(r"\]\((measurements(?![^)]*png)[^)]*)\)", rf"]({tree}/docs/\1)", source[0])


def forget_builtins(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Drops the documentation of `bool` or `int` from attributes that have one as their value."""
    own = {inspect.getdoc(kind) for kind in (bool, int, float, str, tuple, frozenset, type(None))}
    if what in ("attribute", "property") and "\n".join(lines).strip() in own:
        lines.clear()


def keep_errors_together(app: Sphinx, document: nodes.document) -> None:
    """Lets no line break before or after the sign of an error."""
    for text in list(document.findall(nodes.Text)):
        if " ± " in text and text.parent is not None:
            text.parent.replace(text, nodes.Text(text.replace(" ± ", "\u00a0±\u00a0")))


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", forget_builtins, priority=1)
    app.connect("source-read", link_outside)
    app.connect("doctree-read", keep_errors_together)
    app.connect("build-finished", list_versions)
