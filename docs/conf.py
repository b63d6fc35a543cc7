"""The documentation site: `make docs`.

Sphinx reads the checkout as a whole, so that a relative link between two documents, or to a configuration, is the same
on GitHub and in the site.
"""

import inspect
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

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
highlight_language = "none"  # of blocks that do not say theirs
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
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_site"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": False}


def signature_of_class(_app: Sphinx, what: str, _name: str, thing: Any, *_rest: Any) -> tuple[str, None] | None:
    """What Python says, which knows whether `__new__` or `__init__` counts; types are beside the descriptions."""
    if what != "class":
        return None
    signature = inspect.signature(thing)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)), None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", signature_of_class)
