"""Sphinx configuration; `make docs` builds into docs/_build/html."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from collect import collect

import sbi_slotflow

FOLDER = Path(__file__).parent
collect(FOLDER.parent, FOLDER)

project = "sbi_slotflow"
author = "The sbi_slotflow developers"
version = release = sbi_slotflow.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "make_figures.py"]

html_theme = "furo"
html_title = "sbi_slotflow"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Notebooks carry the outputs of a full run.
nb_execution_mode = "off"

autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "set",  # matplotlib writes a Figure.set for every subclass
}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say the types and shapes that matter
napoleon_use_ivar = True
napoleon_use_rtype = False
# The paths of other packages' objects are not checked: their inventories are online.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!sbi_slotflow)[A-Za-z_]+(\..*)?"),
    (r"py:.*", r"sbi_slotflow\..*\._\w+"),
]

doctest_test_doctest_blocks = ""  # docstrings have a test, tests/examples_test.py
doctest_global_setup = """
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
"""


def resolve_public_name(app, env, node, contnode):
    """Find ``sbi_slotflow.SlotPosterior`` where it is defined."""
    target = node.get("reftarget", "")
    package, _, name = target.rpartition(".")
    if node.get("refdomain") != "py" or not package.startswith("sbi_slotflow"):
        return None
    try:
        found = getattr(import_module(package), name)
        home = f"{found.__module__}.{found.__qualname__}"
    except (ImportError, AttributeError):
        return None
    if home == target:
        return None
    return env.get_domain("py").resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], home, node, contnode
    )


def setup(app):
    """Register the above with Sphinx."""
    app.connect("missing-reference", resolve_public_name)
