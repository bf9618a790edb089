"""The documentation: the README's length, links, and that no flag or field is left out."""

import dataclasses
import itertools
import pathlib
import re
import sys

import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
    ]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
MAX_README_LINES = 150


@pytest.fixture(scope="module")
def commands():
    """The module that reads flags and fields for the site."""
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        import commands

        yield commands
    finally:
        sys.path.remove(str(DOCS / "_ext"))


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def _anchors(page: pathlib.Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them; MyST makes the same.

    Labels, `(label)=`, are anchors only on the site.
    """
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    found: set[str] = set()
    for heading in headings:
        slug = re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", "-")
        copies = itertools.count(1)
        anchor = slug
        while anchor in found:
            anchor = f"{slug}-{next(copies)}"
        found.add(anchor)
    return found


def test_the_readme_stays_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_resolve(page):
    broken = []
    for link in LINK.findall(_without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md" and anchor not in _anchors(target):
            broken.append(link)
    assert not broken


def test_no_line_is_a_comment_of_myst():
    """A paragraph's line that begins with a percent sign is missing on the site."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r"^ *%.*$", text, re.M), page


def test_every_page_is_in_a_table_of_contents():
    listed = {DOCS / "index.md"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
            names = [line for line in block.split("\n") if line and not line.startswith(":")]
            # "Title <page>" or "page".
            names = [re.sub(r"^.*<(.*)>$", r"\1", name) for name in names]
            listed |= {page.parent / f"{name}.md" for name in names}
    pages = {page for page in PAGES if DOCS in page.parents}
    # A file that a command wrote; docs/results/bert-batches.md shows it.
    assert pages - listed == {DOCS / "results" / "bert_batches" / "table.md"}


def test_python_of_the_first_tour_runs(tmp_path, monkeypatch):
    """The code blocks of one page, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "getting-started" / "keras.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "keras.md", "exec"), names)
    assert (tmp_path / "logs" / "trust_ratios.png").exists()
    assert (tmp_path / "model.keras").exists()
    assert names["history"].history["accuracy"][-1] > 0.9


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_every_page_is_valid(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, str(page), "exec")


def test_every_public_name_has_a_page():
    import tf_lamb

    pages = {page.stem for page in (DOCS / "api").glob("*.md")}
    assert {name for name in tf_lamb.__all__ if not name.startswith("__")} <= pages


def test_every_command_is_on_a_page(commands):
    """Its flags are generated from the code, so the directive is enough."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "commands").glob("*.md"))
    described = set(re.findall(r"```\{command\} (\S+)", text))
    assert described == {"train", *commands.command_modules()}


def test_the_help_of_every_command_names_the_command(commands):
    """Except that of `export.client`, which users copy, and which has no parser."""
    for name in sorted({*commands.command_modules()} - {"export.client"}):
        path = ROOT / name.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        source = path.read_text(encoding="utf-8").replace("{NAME}", name).replace('f"', '"')
        assert "ArgumentParser(" in source and f'prog="python -m {name}"' in source, name


def test_the_picture_of_the_imports_is_that_of_the_code(commands):
    import imports  # beside `commands`

    with PIL.Image.open(imports.PICTURE) as picture:
        drawn = picture.info["Description"]
    assert drawn == imports.description(imports.imports()), "run: python docs/_ext/imports.py"


def test_every_flag_of_train_is_described(commands):
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    defined = re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source)
    flags = commands.command_flags("train")
    assert [flag.name for flag in flags] == [f"--{name}" for name in defined]
    assert all(flag.help for flag in flags)


def test_every_flag_of_every_command_is_described(commands):
    names = commands.command_modules()
    flags = [(name, flag) for name in names for flag in commands.command_flags(name)]
    assert [f"{name} {flag.name}" for name, flag in flags if not flag.help.strip()] == []
    paths = [f"{name} {flag.name}" for name, flag in flags if str(ROOT) in flag.default + flag.help]
    assert paths == []


def test_flags_of_a_command_are_read_from_its_parser(commands):
    flags = {flag.name: flag for flag in commands.command_flags("inputs.text.prepare")}
    assert {"--input", "--vocab", "--output", "--workers"} <= flags.keys()
    assert flags["--input"].required


def test_every_recipe_class_is_on_the_page_of_fields(commands):
    text = (DOCS / "commands" / "fields.md").read_text(encoding="utf-8")
    described = set(re.findall(r"```\{recipe-fields\} (\S+)", text))
    classes = {f"{cls.__module__}.{cls.__name__}" for cls in commands.recipe_classes()}
    assert described == classes


def test_every_field_of_a_recipe_is_described(commands):
    for recipe_class in commands.recipe_classes():
        parents = [cls for cls in commands.recipe_classes() if issubclass(recipe_class, cls)]
        fields = [field for cls in parents for field in commands.recipe_fields(cls)]
        names = {field.name for field in fields}
        assert names == {field.name for field in dataclasses.fields(recipe_class)}
        assert [field.name for field in fields if not field.meaning] == []


def test_docstrings_become_restructuredtext(commands):
    import docstrings

    text = """Scales.

    x ← x - η

See [a paper](https://arxiv.org/abs/1904.00962).

| rule | rate |
|---|---|
| `a` | 1 |

Args:
    kind: one of
        - first;
        - second.
"""
    lines = docstrings.to_rst(text.splitlines())
    assert lines[2:5] == ["::", "", "    x ← x - η"]
    assert "See `a paper <https://arxiv.org/abs/1904.00962>`__." in lines
    assert ".. list-table::" in lines
    assert lines[lines.index("    kind: one of") + 1] == ""
