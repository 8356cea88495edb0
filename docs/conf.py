"""Settings of the documentation's site: `make docs` builds it, without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kvpolicy

if TYPE_CHECKING:
    pass

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

# Pages are markdown with GitHub's anchors, docstrings are Google's with code in single backticks.
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
python_display_short_literal_types = True

# Names of other packages and of rooms that the reference does not show.
nitpick_ignore_regex = [("py:.*", name) for name in ()]

html_theme = "furo"
html_static_path = ["_static"]
templates_path = ["_templates"]
