"""The documentation site: `make docs`.

Sphinx reads the checkout as a whole, so that a relative link between two documents, or to a configuration, is the same
on GitHub and in the site.
"""

from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(folder.parent.name for folder in ROOT.glob("anomalib_*/__init__.py"))

project = "anomalib-pack"
author = "The anomalib-pack developers"
version = release = metadata.version("anomalib-pack")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**", "anomalib_*/README.md", "configs/README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [
    entry.name for entry in ROOT.iterdir() if entry.is_dir() and entry.name not in {"configs", "docs", *PACKAGES}
]

myst_heading_anchors = 4  # links to headings, as GitHub makes them
nitpicky = True
# What other distributions document is not linked.
nitpick_ignore_regex = [("py:.*", rf"(?!({'|'.join(PACKAGES)})\b).*")]

default_role = "code"
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of a class are part of its text
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"anomalib-pack {version}"
html_extra_path = ["_site"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False}
