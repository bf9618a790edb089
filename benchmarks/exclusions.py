"""What the ready exclusion lists leave alone: python -m benchmarks.exclusions [WORD ...]

Builds models of keras.applications, tf_keras.applications and tf-models and, where they are
installed, of KerasHub and Hugging Face, with new weights; nothing is downloaded. What cannot be
built takes one line. With WORDs only those are built whose name has one of them. What a variable
is follows from the layer that owns it, and not from its path:

    norm   a normalisation layer's scale or offset
    bias   what a layer keeps as its bias
    gain   one factor per channel that no normalisation comes before (LayerScale)
    table  a bias for each relative position
    other  kernels, embeddings and the rest

The columns say how many of these there are, and how many each list decides wrongly: norms and
biases that it misses, and others that it finds. Gains and tables may go either way; the last
column has how many of them are left alone.

`--json=FILE` writes the paths, one of those that differ in numbers alone. The tests' file is such
a one, of all these libraries:

    pip install kagglehub "transformers<5"
    PYTHONPATH=KERAS_HUB_CHECKOUT python -m benchmarks.exclusions --json=FILE
"""

import argparse
import gc
import gzip
import json
import os
import re
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf
import tf_keras

from benchmarks import model_zoo
from tf_lamb import BERT_EXCLUSIONS, RESNET_EXCLUSIONS

KINDS = ("norm", "bias", "gain", "table", "other")
NORM = re.compile(r"(?<!Spectral)(Norm(alization)?|GRN)(V\d|\dd|Gated)?$")  # a class, not a wrapper
LISTS = {"BERT": BERT_EXCLUSIONS, "RESNET": RESNET_EXCLUSIONS}


def parts(model) -> list:
    """A model's layers and modules, itself among them."""
    found = [model, *model._flatten_layers()] if hasattr(model, "_flatten_layers") else [model]
    if isinstance(model, tf.Module):
        found += model.submodules
    return list({id(part): part for part in found}.values())


def owners(model) -> dict[int, list[tuple[str, str]]]:
    """id of each variable -> the (class, attribute) pairs that hold it."""
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
    """What a variable is, of `KINDS`, by the classes and attributes that hold it."""
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
    """What the optimizers search the patterns in."""
    return variable.path if hasattr(variable, "path") else variable.name.split(":")[0]


def variables(model) -> list[tuple[str, str]]:
    """(path, kind) of each variable that is trained."""
    held = owners(model)
    return [(path_of(v), kind_of(v.shape, held.get(id(v), []))) for v in model.trainable_variables]


def left_alone(patterns, path: str) -> bool:
    """Whether an optimizer with these exclusions neither decays nor adapts the variable."""
    return any(re.search(pattern, path) for pattern in patterns)


def wrong(patterns, path: str, kind: str) -> bool:
    """Whether a list misses a norm or bias, or finds one of the others."""
    if kind in ("gain", "table"):
        return False
    return left_alone(patterns, path) != (kind in ("norm", "bias"))


def row(of) -> str:
    """A model's counts, and a line for each odd one."""
    kinds = [kind for _, kind in of]
    counts = [kinds.count(kind) for kind in KINDS]
    bad = [[one for one in of if wrong(patterns, *one)] for patterns in LISTS.values()]
    odd = [path for path, kind in of if kind in ("gain", "table")]
    alone = sum(left_alone(BERT_EXCLUSIONS, path) for path in odd)
    numbers = [len(of), *counts, *map(len, bad), f"{alone}/{len(odd)}" if odd else "-"]
    lines = ["".join(f"{number:>7}" for number in numbers)]
    lines += sorted({f"    wrong: {path} ({kind})" for some in bad for path, kind in some})
    lines += [
        f"    {kind}{' left alone' if left_alone(BERT_EXCLUSIONS, path) else ''}: {path}"
        for path, kind in distinct(of)
        if kind in ("gain", "table")
    ]
    return "\n".join(lines)


def distinct(of) -> list[tuple[str, str]]:
    """The first of those (path, kind) that differ in numbers alone."""
    return list({(like(path), kind): (path, kind) for path, kind in of[::-1]}.values())


def like(path: str) -> str:
    """A path without its numbers."""
    return re.sub(r"_?\d+", "", path)


def main():
    """Builds, prints and, where that is asked, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--json", metavar="FILE", help="where the paths go (.json.gz)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = ["all", *KINDS, *(f"{name:.4}?" for name in LISTS), "alone"]
    print(f"{'model':44}", *(f"{name:>7}" for name in columns), sep="")
    found = {}
    for library, models in model_zoo.libraries().items():
        try:
            models = models()
        except Exception as error:
            print(f"{library:44}not built: {brief(error)}")
            continue
        for name, make in models.items():
            full = f"{library}/{name}"
            if arguments.words and not any(word in full for word in arguments.words):
                continue
            keras.backend.clear_session()
            tf_keras.backend.clear_session()
            gc.collect()
            try:
                of = variables(make())
            except Exception as error:  # whatever a library's model fails with
                print(f"{full:44}not built: {brief(error)}")
                continue
            print(f"{full:44}{row(of)}", flush=True)
            found[full] = {
                kind: sorted(path for path, its in distinct(of) if its == kind) for kind in KINDS
            }
    if arguments.json:
        write(found, arguments.json)


def brief(error) -> str:
    """An exception, on what is left of a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:70]


def write(found, file):
    """As JSON: model -> kind -> paths."""
    text = json.dumps(found, indent=0, sort_keys=True)
    with open(file, "wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed:
        packed.write(text.encode())


if __name__ == "__main__":
    main()
