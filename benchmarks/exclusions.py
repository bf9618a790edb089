"""Checks the default exclusion lists on many networks: python -m benchmarks.exclusions [WORD ...]

Builds models of keras.applications, tf_keras.applications and tf-models and, if they are
installed, of KerasHub and Hugging Face, with new weights; downloads nothing. A model that cannot be
built is reported in one line. With WORDs, builds only models whose name contains one of them. The
kind of a variable follows from the layer that owns it, not from its path:

    norm   scale or offset of a normalization layer
    bias   bias of a layer
    gain   one factor per channel without a preceding normalization (LayerScale)
    table  a bias for each relative position
    other  kernels, embeddings and the rest

The columns count the variables of each kind, and how many each list decides wrongly: norms and
biases that it does not match, and others that it matches. Gains and tables may be excluded or not;
the last column counts those that are.

`--json=FILE` writes the paths; of paths that differ only in numbers, one. The test data is such a
file, of all these libraries:

    pip install kagglehub "transformers<5"
    PYTHONPATH=KERAS_HUB_CHECKOUT python -m benchmarks.exclusions --json=FILE
"""

import argparse
import gc
import gzip
import json
import re
import warnings

from inputs import process  # isort: split

import keras
import tensorflow as tf
import tf_keras

from benchmarks import model_zoo
from inputs.errors import InputError
from inputs.storage.files import atomic_write, check_file_writable
from tf_lamb import BERT_EXCLUSIONS, RESNET_EXCLUSIONS

KINDS = ("norm", "bias", "gain", "table", "other")
# Class names of normalization layers, without wrappers.
NORM = re.compile(
    r"(?<!Spectral)(Norm(alization)?|GRN)(V\d|\dd|Gated)?$"
)  # the class of a layer, not of a wrapper
LISTS = {"BERT": BERT_EXCLUSIONS, "RESNET": RESNET_EXCLUSIONS}


def parts(model) -> list:
    """A model and all its layers and modules."""
    found = [model, *model._flatten_layers()] if hasattr(model, "_flatten_layers") else [model]
    if isinstance(model, tf.Module):
        found += model.submodules
    return list({id(part): part for part in found}.values())


def owners(model) -> dict[int, list[tuple[str, str]]]:
    """id of a variable -> the (class, attribute) pairs that hold it."""
    held = {}
    for part in parts(model):
        for attribute, value in list(vars(part).items()):
            values = value.values() if isinstance(value, dict) else value
            for one in list(values) if isinstance(values, list | tuple) else [value]:
                if isinstance(one, tf.Variable | keras.Variable):
                    held.setdefault(id(one), []).append((type(part).__name__, attribute))
    tracked = ("_trainable_weights", "_trainable_variables")
    return {
        variable: [pair for pair in pairs if pair[1] not in tracked] or pairs
        for variable, pairs in held.items()
    }


def kind_of(shape, pairs) -> str:
    """The kind of a variable, one of `KINDS`, by the (class, attribute) pairs that hold it."""
    names = [f"{kind}.{attribute}" for kind, attribute in pairs]
    if any(NORM.search(kind) for kind, _ in pairs):
        return "norm"
    if any("bias" in attribute for _, attribute in pairs):
        table = any(re.search("rel|table|biases", attribute) for _, attribute in pairs)
        return "table" if table and len(shape) > 1 else "bias"
    if re.search(r"(?i)layer_?scale|lambda|\b_?gamma\b", " ".join(names)):
        return "gain"
    return "other"


def path_of(variable) -> str:
    """The path in which the optimizers search the patterns."""
    return variable.path if hasattr(variable, "path") else variable.name.split(":")[0]


def variables(model) -> list[tuple[str, str]]:
    """(path, kind) of each trainable variable."""
    held = owners(model)
    return [(path_of(v), kind_of(v.shape, held.get(id(v), []))) for v in model.trainable_variables]


def is_excluded(patterns, path: str) -> bool:
    """Whether an optimizer with these exclusions neither decays nor adapts the variable."""
    return any(re.search(pattern, path) for pattern in patterns)


def is_wrong(patterns, path: str, kind: str) -> bool:
    """Whether a list does not match a norm or bias, or matches a variable of kind "other"."""
    if kind in ("gain", "table"):
        return False
    return is_excluded(patterns, path) != (kind in ("norm", "bias"))


def row(of) -> str:
    """A model's counts, and a line for each wrong decision, gain and table.

    Args:
        of: (path, kind) of each variable.
    """
    kinds = [kind for _, kind in of]
    counts = [kinds.count(kind) for kind in KINDS]
    wrong = [[one for one in of if is_wrong(patterns, *one)] for patterns in LISTS.values()]
    either = [path for path, kind in of if kind in ("gain", "table")]
    excluded = sum(is_excluded(BERT_EXCLUSIONS, path) for path in either)
    numbers = [len(of), *counts, *map(len, wrong), f"{excluded}/{len(either)}" if either else "-"]
    lines = ["".join(f"{number:>7}" for number in numbers)]
    lines += sorted({f"    wrong: {path} ({kind})" for some in wrong for path, kind in some})
    lines += [
        f"    {kind}{' excluded' if is_excluded(BERT_EXCLUSIONS, path) else ''}: {path}"
        for path, kind in distinct(of)
        if kind in ("gain", "table")
    ]
    return "\n".join(lines)


def distinct(of) -> list[tuple[str, str]]:
    """One (path, kind) of those that differ only in numbers."""
    return list({(without_numbers(path), kind): (path, kind) for path, kind in of[::-1]}.values())


def without_numbers(path: str) -> str:
    """A path without its numbers."""
    return re.sub(r"_?\d+", "", path)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exclusions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="only models whose name (LIBRARY/MODEL) contains one of the words",
    )
    parser.add_argument("--json", metavar="FILE", help="write the paths to this file (.json.gz)")
    arguments = parser.parse_args()
    if arguments.json:
        check_file_writable(arguments.json, f"--json={arguments.json}")
    warnings.simplefilter("ignore")
    makers = all_makers(arguments.words)
    columns = ["all", *KINDS, *(f"{name:.4}?" for name in LISTS), "excl."]
    print(f"{'model':44}", *(f"{name:>7}" for name in columns), sep="")
    found = {}
    for full, make in makers.items():
        if arguments.words and not any(word in full for word in arguments.words):
            continue
        keras.backend.clear_session()
        tf_keras.backend.clear_session()
        gc.collect()
        try:
            of = variables(make())
        except Exception as error:  # a model of another library may fail in any way
            print(f"{full:44}not built: {brief(error)}")
            continue
        print(f"{full:44}{row(of)}", flush=True)
        found[full] = {
            kind: sorted(path for path, its in distinct(of) if its == kind) for kind in KINDS
        }
    if arguments.json:
        write(found, arguments.json)


def all_makers(words) -> dict:
    """LIBRARY/MODEL -> the function that builds it, of all libraries that can be imported.

    Args:
        words: parts of names, which must each be in one.

    Raises:
        InputError: a word is in no name.
    """
    makers = {}
    for library, models in model_zoo.libraries().items():
        try:
            makers |= {f"{library}/{name}": make for name, make in models().items()}
        except Exception as error:
            print(f"{library:44}not built: {brief(error)}")
    if unknown := [word for word in words if not any(word in full for full in makers)]:
        libraries = dict.fromkeys(full.partition("/")[0] for full in makers)
        raise InputError(
            f"{unknown[0]!r} is in the name of no model. The names are LIBRARY/MODEL, of the "
            f"libraries {', '.join(libraries)}."
        )
    return makers


def brief(error) -> str:
    """An exception, shortened to fit on the line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:70]


def write(found, file):
    """Writes JSON, compressed by gzip: model -> kind -> paths."""
    text = json.dumps(found, indent=0, sort_keys=True)
    with atomic_write(file, "wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed:
        packed.write(text.encode())


if __name__ == "__main__":
    process.run(main)
