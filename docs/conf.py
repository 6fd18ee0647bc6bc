"""Sphinx configuration; `make docs` builds it."""

from __future__ import annotations

import re

import padkern

project = "padkern"
author = "The padkern authors"
copyright = "2026, the padkern authors"
version = release = padkern.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"padkern {release}"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# Class docstrings describe the arguments of __init__.
autoclass_content = "class"
napoleon_numpy_docstring = False

# References in docstrings that name a parameter or another project's class stay plain text.
nitpicky = False


def _code_spans(app, what, name, obj, options, lines):
    """Docstrings write code in single or double backticks; single ones mean code here too."""
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"(?<![`:\w])`([^`\n]+)`(?![`_])", r"``\1``", line)


def setup(app):
    app.connect("autodoc-process-docstring", _code_spans)
