"""Sphinx directives that read the code, and the check that nothing public is left out.

`command` describes a command and its flags, `recipe-fields` the fields of a recipe class,
`recipe-table` the recipes of a task, `variants` the variants of an optimizer. The check runs at
the end of a build, and its warnings fail the build under `sphinx-build -W`.
"""

import importlib
import inspect
import re

import commands
import docstrings
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

LOG = logging.getLogger(__name__)


def escape(text: str) -> str:
    """Escapes Markdown outside of code, and marks flags as code."""
    text = re.sub(r"(?<![\w`-])--[a-z_]+(=[\w:,.]+\w)?", r"`\g<0>`", text)
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<\[\]|])", r"\\\1", part) for part in parts
    )


def code(text: str) -> str:
    """Returns text as Markdown code."""
    return f"`{text}`"


def sentence(text: str) -> str:
    """Returns text with a capital letter and a full stop; a name at its start stays as it is."""
    if not text:
        return ""
    first = text.split()[0]
    if re.fullmatch("[a-z-]+[,:;.]?", first):
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


class FromCode(SphinxDirective):
    """A directive whose content is Markdown made from the code."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        """Parses the lines that `markdown` returns."""
        node = nodes.Element()
        lines = self.markdown(self.arguments[0])
        source = self.get_source_info()[0] or "code"
        self.state.nested_parse(StringList(lines, source), 0, node)
        described = self.env.__dict__.setdefault("described_in_docs", {})
        described.setdefault(self.name, set()).add(self.arguments[0])
        return node.children


class Command(FromCode):
    """`{command} inputs.text.prepare`: usage and all flags."""

    def markdown(self, name):
        """Returns the usage and a definition list of the flags."""
        lines = []
        if name != "train":
            doc = inspect.getdoc(importlib.import_module(name)) or ""
            lines += ["```text", *doc.splitlines(), "```", ""]
        section = None
        for flag in commands.command_flags(name):
            if flag.section != section and (section is not None or flag.section):
                lines += [f"**`{flag.section}`**", ""]
            section = flag.section
            usage = f"{flag.name}={flag.value}" if flag.value else flag.name
            if not flag.help.strip():
                LOG.warning("%s of the command %s has no help text", flag.name, name)
            text = sentence(escape(flag.help.strip()))
            if flag.choices:
                text += " One of " + ", ".join(code(choice) for choice in flag.choices) + "."
            if flag.required:
                text += " Required."
            if flag.default:
                text += f" Default: {code(flag.default)}."
            lines += [code(usage), f": {text}", ""]
        return lines


class RecipeFields(FromCode):
    """`{recipe-fields} recipes.types.Recipe`: the fields that the class declares."""

    def markdown(self, path):
        """Returns a definition list of the fields."""
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        lines = []
        for field in commands.recipe_fields(cls):
            text = sentence(escape(field.meaning)) + " " if field.meaning else ""
            default = field.default if len(field.default) < 60 else "BERT_EXCLUSIONS"
            kind = field.type.replace(", ...", "")
            text += f"Type: {code(kind)}." + (f" Default: {code(default)}." if default else "")
            lines += [code(field.name), f": {text}", ""]
        return lines


class RecipeTable(FromCode):
    """`{recipe-table} bert`: the recipes of a task, with their constants and sources."""

    def markdown(self, task):
        """Returns a table of the constants, and a list of the sources."""
        recipes = importlib.import_module("recipes")
        table = ["| recipe | batch | steps | peak rate | warm-up |", "|---|---|---|---|---|"]
        sources = ["", "**Sources**", ""]
        for recipe in recipes.RECIPES.values():
            if recipe.task != task or recipe in recipes.mlperf.MLPERF_RECIPES:
                continue  # those have a table of their own
            phases = recipe.phases
            columns = (
                " + ".join(f"{phase.global_batch_size:,}" for phase in phases),
                " + ".join(f"{phase.steps:,}" for phase in phases),
                ", ".join(f"{phase.peak_learning_rate:.4g}" for phase in phases),
                " + ".join(f"{phase.warmup_steps:,}" for phase in phases),
            )
            table.append(f"| {code(recipe.name)} | {' | '.join(columns)} |")
            optimizer = recipe.optimizer + (f" ({recipe.variant})" if recipe.variant else "")
            sources += [
                code(recipe.name),
                f": {escape(recipe.reference)}. Optimizer: {optimizer}. "
                f"Expected: {escape(recipe.expected)}.",
                "",
            ]
        return table + sources


class MLPerfTable(FromCode):
    """`{mlperf-table} results bert`: MLPerf's results of a task, or its `references`."""

    def markdown(self, what):
        """Returns a table of the settings, and a list of the sources."""
        mlperf = importlib.import_module("recipes.mlperf")
        kind, _, task = what.partition(" ")
        records = [r for r in getattr(mlperf, kind.upper()) if r.recipe.task == task]
        lamb = task == "bert"
        first = ["round", "minutes"] if kind == "results" else ["examples", "runs"]
        names = ["recipe", *first, "batch", "peak rate", "warm-up", "steps"]
        names += ["β₁, β₂"] if lamb else ["μ"]
        names += ["λ", "clipped", "summed in"]
        table = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        sources = ["", "**Sources**", ""]
        for record in records:
            recipe = record.recipe
            (phase,) = recipe.phases
            if kind == "results":
                columns = [record.round, f"{record.minutes:g}"]
            else:
                unit = 1e6 if lamb else 1_281_167
                columns = [
                    f"{record.examples / unit:.3g} ± {record.deviation / unit:.2g} "
                    f"{'M' if lamb else 'epochs'}",
                    str(record.runs),
                ]
            warmup = f"{phase.warmup_steps:,}"
            warmup += f" from {phase.warmup_from}" if phase.warmup_from else ""
            clipped = "no"
            if recipe.global_clipnorm:
                side = "before" if recipe.clip_each_replica else "after"
                clipped = f"at {recipe.global_clipnorm:g}, {side} the sum"
            betas = f"{recipe.beta_1:.4g}, {recipe.beta_2:.4g}"
            columns += [
                f"{phase.global_batch_size:,}",
                f"{phase.peak_learning_rate:.4g}",
                warmup,
                f"{phase.steps:,}",
                betas if lamb else f"{recipe.momentum:.4g}",
                f"{recipe.weight_decay:.4g}",
                clipped,
                recipe.sum_dtype,
            ]
            table.append(f"| {code(recipe.name)} | {' | '.join(columns)} |")
            sources += [code(recipe.name), f": {escape(record.source)}.", ""]
        return table + sources


class LeaveOneOut(FromCode):
    """`{leave-one-out} BERT`: errors of each reference point predicted from the others."""

    def markdown(self, name):
        """Returns a table of relative errors, in percent."""
        evidence = getattr(importlib.import_module("recipes.evidence"), name)
        rules = ("evidence", "sqrt", "linear")
        titles = ["between its neighbors", "the paper's rule", "the linear rule"]
        names = [f"{what}: {t}" for what in ("examples", "rate") for t in titles]
        lines = [f"| batch | {' | '.join(names)} |", "|" + "---|" * (1 + len(names))]
        for row in evidence.leave_one_out():
            errors = [row.errors(rule) for rule in rules]
            cells = [
                "cannot tell" if pair is None else f"{pair[index]:+.1%}"
                for index in range(2)
                for pair in errors
            ]
            lines.append(f"| {row.reference.batch:,} | {' | '.join(cells)} |")
        return lines


class Variants(FromCode):
    """`{variants} lamb`: the variants of an optimizer, their sources and arguments."""

    def markdown(self, rule):
        """Returns a table."""
        lines = ["| variant | source | arguments |", "|---|---|---|"]
        for name, variant in importlib.import_module(f"tf_lamb.{rule}").VARIANTS.items():
            arguments = ", ".join(f"{k}={v!r}" for k, v in variant.arguments.items())
            shown = code(arguments.replace("|", "\\|")) if arguments else "the defaults"
            lines.append(f"| {code(name)} | {escape(variant.source)} | {shown} |")
        return lines


def public_names() -> list[str]:
    """Returns the full names of everything public in the library."""
    library = importlib.import_module("tf_lamb")
    flavor = importlib.import_module("tf_lamb.tf_keras")
    names = [name for name in library.__all__ if not name.startswith("__")]
    flavor_names = getattr(flavor, "__all__", None) or [
        name
        for name in names
        if isinstance(getattr(flavor, name, None), type)
        and getattr(flavor, name).__module__.startswith("tf_lamb")
    ]
    return [f"tf_lamb.{n}" for n in names] + [f"tf_lamb.tf_keras.{n}" for n in flavor_names]


def check_complete(app, env):
    """Warns of every public name, command and recipe class that no page describes."""
    documented = env.domaindata["py"]["objects"]
    described = env.__dict__.get("described_in_docs", {})
    for name in public_names():
        if name not in documented:
            LOG.warning("no page of the API reference describes %s", name)
    for name in ["train", *commands.command_modules()]:
        if name not in described.get("command", ()):
            LOG.warning("no page describes the command %s", name)
    for cls in commands.recipe_classes():
        name = f"{cls.__module__}.{cls.__name__}"
        if name not in described.get("recipe-fields", ()):
            LOG.warning("no page describes the recipe class %s", name)


def convert_docstring(app, what, name, obj, options, lines):
    """Makes reStructuredText of a docstring, before napoleon reads its sections."""
    lines[:] = docstrings.to_rst(lines)


def setup(app):
    """Registers the directives, the conversion and the check."""
    app.add_directive("command", Command)
    app.add_directive("recipe-fields", RecipeFields)
    app.add_directive("recipe-table", RecipeTable)
    app.add_directive("mlperf-table", MLPerfTable)
    app.add_directive("leave-one-out", LeaveOneOut)
    app.add_directive("variants", Variants)
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
    app.connect("env-check-consistency", check_complete)
    return {"parallel_read_safe": False}
