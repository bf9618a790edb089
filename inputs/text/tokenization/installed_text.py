"""English text that is installed anyway: Python's help topics and the docstrings of packages."""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pydoc_data.topics import topics

# The well-documented packages of the training stack. The list is fixed, so that other installed
# packages do not change the text; a missing package is skipped.
PACKAGES = ("keras", "matplotlib", "numpy", "pandas", "scipy", "sklearn", "tensorflow")

DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
CODE = re.compile(r">>>|```|\|.*\|")
HEADING = re.compile(r"^.*\n\s*[-=~]{3,}\s*$", re.MULTILINE)  # reStructuredText: underlined title
NOT_LETTERS = re.compile(r"[^A-Za-z ]")


def read_installed_text() -> Iterator[list[str]]:
    """Yields each help topic and docstring as a list of paragraphs of prose.

    Code examples, tables and signatures are dropped. Repeated paragraphs are dropped, too, because
    documentation repeats itself and held-out text must not occur in the training text.
    """
    seen: set[str] = set()
    for text in _texts():
        paragraphs = []
        for block in re.split(r"\n\s*\n", text):
            paragraph = _prose(block)
            key = paragraph.lower()
            if paragraph and key not in seen:
                seen.add(key)
                paragraphs.append(paragraph)
        if paragraphs:
            yield paragraphs


def _prose(block: str) -> str:
    """The block as one line without headings and rules; "" if it is short, code or a table."""
    if CODE.search(block):
        return ""
    paragraph = " ".join(HEADING.sub("", block).split())
    letters = len(NOT_LETTERS.sub("", paragraph))
    return paragraph if len(paragraph) >= 40 and letters >= 0.8 * len(paragraph) else ""


def _texts() -> Iterator[str]:
    for topic in sorted(topics):
        yield topics[topic]
    for package in PACKAGES:
        root = os.path.join(sysconfig.get_path("purelib"), package)
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(set(folders) - {"test", "tests", "testing"})
            for name in sorted(files):
                if name.endswith(".py") and not name.startswith("test_"):
                    yield from _docstrings(os.path.join(folder, name))


def _docstrings(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
        if '"""' not in source:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in the packages
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):  # a template, or code for another Python
        return
    # Function bodies are skipped: definitions inside them seldom have docstrings.
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop(0)
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
        if isinstance(node, ast.Module | ast.ClassDef):
            nodes += [child for child in node.body if isinstance(child, DOCUMENTED)]
