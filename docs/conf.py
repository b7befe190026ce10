"""Settings of the documentation. `make docs` builds it; a warning is an error."""

import re

from rein import __version__

project, author, copyright = "rein", "the rein authors", "the rein authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"rein {version}"
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"Model": "Model"}
napoleon_use_rtype = False


def _name_files_outside(app, name, source):
    """Files outside of this folder are not part of the site: their links become names."""
    source[0] = re.sub(r"\[([^\]]*)\]\(\.\./([^)#]*)[^)]*\)", r"\1 (`\2` in the repository)", source[0])


def setup(app):
    """Connect to Sphinx."""
    app.connect("source-read", _name_files_outside)
