"""How Sphinx makes the documentation: ``sphinx-build -W docs OUTPUT``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import chest

project = "chest"
author = "the chest developers"
copyright = author  # noqa: A001 -- the name that Sphinx wants
release = version = chest.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"
html_theme = "alabaster"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
