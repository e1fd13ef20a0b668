"""Settings of the documentation site: ``sphinx-build -W -n -b html docs docs/_build/html``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

from pytest_qvl import __version__  # noqa: E402

project = "pytest-qvl"
author = "The authors of pytest-qvl"
release = version = __version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "qvl_reference", "qvl_links", "qvl_diagrams"]
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = "pytest-qvl"
html_static_path = ["_static"]
html_css_files = ["qvl.css"]
html_show_copyright = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": False}

myst_heading_anchors = 4
myst_enable_extensions = ["deflist", "attrs_block", "html_image"]
myst_fence_as_directive = ["mermaid"]

nitpicky = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = False
# Nothing is fetched: addresses outside of the repository are left to the nightly `linkcheck`.
linkcheck_ignore = [] if "linkcheck-all" in sys.argv else [r"https?://.*"]
suppress_warnings = ["config.cache"]
