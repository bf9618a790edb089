"""Turns the docstrings' mixture of Markdown and indented formulas into reStructuredText."""

import re

LINK = re.compile(r"\[([^\]]+)\]\((https?://[^)\s]+)\)")
SECTION = re.compile(
    r"(Args|Attributes|Returns|Yields|Raises|Examples?|Notes?|References?|Differs from):$"
)
# Sections of names with a text each: there the first indentation is not a quotation.
NAMED = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:", "References:", "Reference:")


def to_rst(lines: list[str]) -> list[str]:
    """Converts a docstring.

    Links, pipe tables and fenced code become their reStructuredText equivalents. A block that is
    indented after a blank line becomes a literal block, so that formulas keep their columns.
    """
    out: list[str] = []
    position = 0
    previous = 0  # indentation of the last line of text
    literal = None  # indentation at which the current literal block began
    after_section = False
    in_list = False
    while position < len(lines):
        line = lines[position]
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if not bare:
            out.append("")
            position += 1
            continue
        if literal is not None:
            if indent >= literal:
                out.append(line)
                position += 1
                continue
            literal = None
        if bare.startswith("```"):
            position = _fence(lines, position, indent, out)
            continue
        if bare.startswith("|") and position + 1 < len(lines) and _is_rule(lines[position + 1]):
            position = _table(lines, position, indent, out)
            continue
        blank_before = not out or not out[-1].strip()
        if blank_before and indent > previous and not after_section and out:
            # "::" belongs to the paragraph before, whose body may be four columns further in.
            out += [" " * (indent - 4) + "::", "", line]
            literal = indent
            position += 1
            continue
        if bare.startswith("- ") and not blank_before and not in_list:
            out.append("")  # a list needs a blank line before it
        in_list = bare.startswith("- ") or (in_list and not blank_before)
        section = SECTION.match(bare)
        # A heading, a list item and a named entry are followed by their own indentation.
        after_section = bool(section) and bare in NAMED or bare.startswith("- ")
        if section and not after_section:
            after_section = True
        out.append(_links(line))
        previous = indent
        position += 1
    return out


def _links(text: str) -> str:
    return LINK.sub(r"`\1 <\2>`__", text)


def _is_rule(line: str) -> bool:
    return bool(re.fullmatch(r"\s*\|?[\s:|-]+\|?\s*", line)) and "-" in line


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _table(lines, position, indent, out) -> int:
    rows = [_cells(lines[position])]
    position += 2
    while position < len(lines) and lines[position].strip().startswith("|"):
        rows.append(_cells(lines[position]))
        position += 1
    pad = " " * indent
    out += [f"{pad}.. list-table::", f"{pad}   :header-rows: 1", ""]
    for row in rows:
        for column, cell in enumerate(row):
            mark = "* -" if column == 0 else "  -"
            out.append(f"{pad}   {mark} {_links(cell)}")
    out.append("")
    return position


def _fence(lines, position, indent, out) -> int:
    language = lines[position].strip().strip("`") or "text"
    pad = " " * indent
    out += [f"{pad}.. code-block:: {language}", ""]
    position += 1
    while position < len(lines) and not lines[position].strip().startswith("```"):
        out.append("   " + lines[position])
        position += 1
    out.append("")
    return position + 1
