"""English that every installation has: Python's help topics and its packages' docstrings."""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pydoc_data.topics import topics

# The well-documented part of the training stack. Named, so that what else is installed changes
# nothing; a package that is missing is left out.
PACKAGES = ("keras", "matplotlib", "numpy", "pandas", "scipy", "sklearn", "tensorflow")

DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
CODE = re.compile(r">>>|```|\|.*\|")
HEADING = re.compile(r"^.*\n\s*[-=~]{3,}\s*$", re.MULTILINE)  # reStructuredText: title over rule
NOT_LETTERS = re.compile(r"[^A-Za-z ]")


def read_installed_text() -> Iterator[list[str]]:
    """Yields each help topic and docstring as a list of paragraphs of prose, none twice.

    Code examples, tables and signatures are left out. A paragraph that stood in an earlier
    document is dropped: documentation repeats itself, and held-out text must be new.
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
    """The block as one line, without headings and rules; empty if it is code or a table."""
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
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):  # a template, or written for another Python
        return
    # Function bodies are not walked: what is defined there is seldom documented.
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop(0)
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
        if isinstance(node, ast.Module | ast.ClassDef):
            nodes += [child for child in node.body if isinstance(child, DOCUMENTED)]
