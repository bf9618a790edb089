"""Configuration of the documentation site. `make docs` builds it."""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's start-up notices

import tf_lamb  # noqa: E402

project = "tf_lamb"
author = "the tf_lamb authors"
release = tf_lamb.__version__
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "project",
]
exclude_patterns = ["_build", "_ext", "results/bert_batches/table.md"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
default_role = "literal"
smartquotes_action = "D"  # dashes; quotation marks are often code

autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Differs from", "Reference"]
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"tf_lamb {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {"source_edit_link": "", "top_of_page_buttons": []}
copybutton_prompt_text = ">>> "
