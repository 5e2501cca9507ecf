"""The site: `sphinx-build -W --keep-going docs site`. It needs no network, neither to be built nor to be read."""

import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

project = "axolotl-mopo"
author = "the axolotl-mopo contributors"
project_copyright = author
version = release = installed("axolotl-mopo")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"axolotl-mopo {version}"
html_copy_source = False
html_show_sourcelink = False
highlight_language = "text"


def skip_inherited(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool:
    """Leave out what pydantic puts into every settings class."""
    return skip or name.startswith("model_")


def link_to_repository(app: Sphinx, name: str, source: list[str]) -> None:
    """Make links to Markdown files of the repository, which are no pages of the site, links to the files."""
    folder, root = (Path(app.srcdir) / name).parent, Path(app.srcdir).resolve()

    def linked(match: re.Match[str]) -> str:
        inside = (folder / match[1]).resolve().is_relative_to(root)
        return match[0] if inside else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\(((?:\.\./)+[\w/.-]+\.md)(?:#[\w-]+)?\)", linked, source[0])


def full_width(app: Sphinx, doctree: nodes.document) -> None:
    """Give every picture the width of the page, as vector graphics have none of their own."""
    for image in doctree.findall(nodes.image):
        image.setdefault("width", "100%")


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-skip-member", skip_inherited)
    app.connect("source-read", link_to_repository)
    app.connect("doctree-read", full_width)
