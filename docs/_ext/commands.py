"""Reads the flags of the project's commands and the fields of its recipes from the code."""

import argparse
import ast
import dataclasses
import importlib
import inspect
import io
import pathlib
import sys
import tokenize
from unittest import mock

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("inputs", "training", "preflight", "export", "experiments", "benchmarks")
# Started by other commands in a process of their own; nobody types their names.
CHILD_PROCESSES = frozenset(
    (
        "preflight.compiler.child",
        "preflight.probe",
        "training.host",
    )
)


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag or positional argument of a command.

    Attributes:
        name: `--flag`, or the metavariable of a positional argument.
        value: what stands for the value in a usage line; empty for a switch.
        help: one or a few sentences.
        default: the default as it is typed, or an empty string where there is none.
        required: whether the command fails without it.
        choices: the values that are accepted, or empty.
        section: the sub-command that the flag belongs to, or an empty string.
    """

    name: str
    value: str
    help: str
    default: str = ""
    required: bool = False
    choices: tuple[str, ...] = ()
    section: str = ""


def command_modules() -> list[str]:
    """Returns the modules that are run with `python -m`, in alphabetical order."""
    names = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                names.append(name.removesuffix(".__main__"))
    return [name for name in names if name not in CHILD_PROCESSES]


def train_flags() -> list[Flag]:
    """Returns the flags of train.py, in the order of its source."""
    importlib.import_module("train")
    from absl import flags

    kinds = {"integer": "N", "float": "X", "bool": "", "multi string": "FIELD=VALUE"}
    found = []
    for flag in flags.FLAGS.flags_by_module_dict()["train"]:
        kind = flag.flag_type()
        default = "" if flag.value in (None, "", [], False) else str(flag.default)
        found.append(Flag(f"--{flag.name}", kinds.get(kind, "VALUE"), _help(flag), default))
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    return sorted(found, key=lambda flag: source.index(f'"{flag.name[2:]}"'))


def _help(flag) -> str:
    """The help text without the sentence that absl adds to a repeatable flag."""
    return flag.help.split(";\n")[0].split("; repeat this option")[0]


class _ParserFound(Exception):
    """Raised with the parser in place of parsing."""


def _stop(parser, *unused_arguments, **unused_named_arguments):
    raise _ParserFound(parser)


def find_parser(module_name: str) -> argparse.ArgumentParser | None:
    """Returns the argument parser that a command makes, or None if it makes none.

    The function that makes the parser is called up to the point where it would parse.
    """
    module = importlib.import_module(module_name)
    if hasattr(module, "__path__"):  # `python -m PACKAGE` runs its __main__
        module = importlib.import_module(f"{module_name}.__main__")
    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
        if not any(name.endswith("ArgumentParser") for name in calls):
            continue
        function = getattr(module, node.name)
        required = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        argv = [f"python -m {module_name}"]
        with (
            mock.patch.object(argparse.ArgumentParser, "parse_args", _stop),
            mock.patch.object(argparse.ArgumentParser, "parse_known_args", _stop),
            mock.patch.object(sys, "argv", argv),
        ):
            try:
                made = function(*([] for _ in required))
            except _ParserFound as found:
                return found.args[0]
        if isinstance(made, argparse.ArgumentParser):
            return made
    return None


def parser_flags(parser: argparse.ArgumentParser, section: str = "") -> list[Flag]:
    """Returns the flags of a parser and of its sub-commands."""
    found, later = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                later += parser_flags(sub, f"{section} {name}".strip())
            continue
        if isinstance(action, argparse._HelpAction):
            continue
        positional = not action.option_strings
        name = action.metavar or action.dest if positional else action.option_strings[-1]
        if isinstance(name, tuple):
            name = name[0]
        value = ""
        if not positional and action.nargs != 0:
            value = str(action.metavar or action.dest.upper())
        default = ""
        unset = action.default in (None, False, "", [], argparse.SUPPRESS)
        if not unset and "default" not in (action.help or "").lower():
            default = str(action.default)
        choices = tuple(map(str, action.choices or ()))
        found.append(
            Flag(
                str(name),
                value,
                (action.help or "").replace("%(default)s", str(action.default)),
                default,
                required=action.required and action.nargs not in ("?", "*"),
                choices=choices,
                section=section,
            )
        )
    return found + later


def command_flags(name: str) -> list[Flag]:
    """Returns the flags of `train` or of a module that is run with `python -m`."""
    if name == "train":
        return train_flags()
    parser = find_parser(name)
    return [] if parser is None else parser_flags(parser)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a recipe or of a phase: its name, type, default and meaning."""

    name: str
    type: str
    default: str
    meaning: str


def recipe_classes() -> list[type]:
    """Returns `Recipe`, `Phase` and their subclasses in the package `recipes`."""
    types = importlib.import_module("recipes.types")
    found = [types.Recipe, types.Phase]
    for path in sorted((ROOT / "recipes").glob("*.py")):
        if path.stem.startswith("__"):
            continue
        module = importlib.import_module(f"recipes.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, (types.Recipe, types.Phase)):
                if value not in found:
                    found.append(value)
    return found


def recipe_fields(cls: type) -> list[Field]:
    """Returns the fields that a recipe class declares itself, with their documentation.

    The meaning comes from the `Attributes:` section of the class's docstring, or else from the
    comment on the field's line or above it.
    """
    documented = _attribute_docs(inspect.getdoc(cls) or "")
    comments = _field_comments(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    found = []
    for name in cls.__dict__.get("__annotations__", {}):
        field = fields[name]
        default = "" if field.default is dataclasses.MISSING else repr(field.default)
        annotation = field.type if isinstance(field.type, str) else _type_name(field.type)
        meaning = documented.get(name) or comments.get(name, "")
        found.append(Field(name, annotation, default, meaning))
    return found


def _type_name(annotation) -> str:
    return annotation.__name__ if type(annotation) is type else str(annotation)


def _attribute_docs(doc: str) -> dict[str, str]:
    """Reads `name: text` entries of the sections "Attributes:" and "Args:"."""
    found = {}
    name = None
    inside = False
    indent = 0
    for line in doc.splitlines():
        bare = line.strip()
        if bare in ("Attributes:", "Args:"):
            inside = True
            name = None
            indent = 0
        elif inside and bare:
            width = len(line) - len(line.lstrip())
            if width == 0:
                inside = False
                continue
            indent = indent or width
            head, colon, text = bare.partition(":")
            if width == indent and colon:
                name = head.split(" ")[0].strip("`")
                found[name] = text.strip()
            elif name:
                found[name] += " " + bare
    return found


def _field_comments(cls: type) -> dict[str, str]:
    """Reads the comments of the fields: on the line itself, or on the lines above it."""
    source = inspect.getsource(cls)
    comments = {}
    only = set()
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").strip()
            if lines[token.start[0] - 1].strip().startswith("#"):
                only.add(token.start[0])
    found = {}
    for node in ast.parse(source).body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = []
        line = node.lineno - 1
        while line in only:
            above.insert(0, comments[line])
            line -= 1
        text = [comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
        found[node.target.id] = " ".join(text or above)
    return found
