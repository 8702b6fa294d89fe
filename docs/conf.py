"""Sphinx configuration."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import lightning_bayes

project = "lightning-bayes"
author = "The lightning-bayes developers"
release = version = lightning_bayes.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
add_module_names = False
html_theme = "furo"
html_title = "lightning-bayes"
# Included by other pages.
exclude_patterns = ["_build", "benchmarks/*.md", "examples/*.md", "gradient_noise/*.md"]
