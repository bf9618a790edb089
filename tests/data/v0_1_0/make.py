"""Wrote the files in this folder with version 0.1.0 (commit 96e086f), to show that they still load.

    python tests/data/v0_1_0/make.py FOLDER

It ran on a CPU under TensorFlow 2.20.0, Keras 3.15.1 and tf_keras 2.20.1. The files are not to be
written again: another version's files show nothing about this one's.

A small Sequential model (`make_model`) is trained for three steps, saved in every format, and
trained for two steps more. `CASES` has the optimizers, by flavour of Keras.

files.zip                     all of the following, as they were written; HDF5 packs to a tenth
keras3/CASE.keras             `model.save`
keras3/CASE.weights.h5        `model.save_weights`; holds the optimizer, too
keras3/lamb.checkpoint.*      `tf.train.Checkpoint(model=model, optimizer=model.optimizer).write`
tf_keras/CASE.keras           `model.save`
tf_keras/CASE.h5              `model.save`, the HDF5 format
tf_keras/CASE.weights.*       `model.save_weights(save_format="tf")`; holds the optimizer, too
tf_keras/CASE.checkpoint.*    `tf.train.Checkpoint(model=model, optimizer=model.optimizer).write`
tf_keras/lamb.saved_model/    `model.save(save_format="tf")`
config.json                   {flavour: {name: `get_config()`}}, most arguments off their defaults
expected.npz                  what the files hold, and where training goes from there

Keys of expected.npz; i is the variable's position in `model.weights` (weights) or in
`model.trainable_weights` (everything else):

x, y                              the data: 5 batches of 8, the first three before the files
FLAVOUR/CASE/config               `get_config()` as JSON
FLAVOUR/CASE/iterations           of the optimizer
FLAVOUR/CASE/skipped_steps        of the optimizer
FLAVOUR/CASE/telemetry            `telemetry_rows`, where it is on
FLAVOUR/CASE/weights/i            of the model
FLAVOUR/CASE/m/i, v/i             LAMB's slots
FLAVOUR/CASE/momentum/i           LARS's slot
FLAVOUR/CASE/ema/i                moving averages, where `use_ema` is on
FLAVOUR/CASE/accumulated/i        gradients, where `gradient_accumulation_steps` is on
FLAVOUR/CASE/after/weights/i      of the model, after the two last batches
FLAVOUR/CASE/after/iterations     likewise

Version 0.1.0 loaded every file to the same bits and went on to the same bits, with two conditions:

- A weights file or a checkpoint wants `optimizer.build(model.trainable_variables)` first; so does
  the SavedModel, and then `load_weights` of its variables/variables.
- tf_keras/lamb.h5 wants `custom_objects={"WarmupPolynomialDecay": ...}`: the HDF5 format does not
  find a registered schedule ("Unknown decay").

On another machine the steps after loading may round differently.

Batches go through `train_on_batch`: `fit` would end with the moving averages in the model.
"""

import json
import os
import pathlib
import sys
import tempfile
import zipfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
import tf_keras

import tf_lamb.keras3
import tf_lamb.tf_keras

FLAVOURS = {"keras3": (keras, tf_lamb.keras3), "tf_keras": (tf_keras, tf_lamb.tf_keras)}
BEFORE, AFTER = range(3), range(3, 5)
EXCLUDED = ["bias", "gamma", "beta"]


def schedule(lamb):
    return lamb.WarmupPolynomialDecay(0.1, warmup_steps=2, total_steps=10, end_learning_rate=0.01)


def lamb_with_schedule(lamb, **arguments):
    return lamb.LAMB(schedule(lamb), exclude_from_weight_decay=EXCLUDED, **arguments)


def lamb_with_number(lamb, **arguments):
    return lamb.LAMB(0.05, **arguments)


def lars(lamb, **arguments):
    return lamb.LARS(0.5, trust_coefficient=0.1, exclude_from_weight_decay=["bias"], **arguments)


BOTH = {
    "lamb": (lamb_with_schedule, {}),
    "lamb_telemetry": (lamb_with_number, {"telemetry": True}),
    "lars": (lars, {}),
    "lars_telemetry": (lars, {"telemetry": True}),
}
CASES = {
    "keras3": BOTH
    | {
        "lamb_ema": (lamb_with_number, {"use_ema": True, "ema_momentum": 0.9}),
        "lamb_accumulation": (lamb_with_number, {"gradient_accumulation_steps": 2}),
    },
    "tf_keras": BOTH,
}


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4)).astype("float32")
    return x, (x[:, :1] - 0.5 * x[:, 1:2]).astype("float32")


def make_model(flavour, case, seed=0):
    """A compiled model of 6 trainable variables and 2 others; the same for the same seed."""
    kit, lamb = FLAVOURS[flavour]
    optimizer, arguments = CASES[flavour][case]
    kit.utils.set_random_seed(seed)
    layers = kit.layers
    model = kit.Sequential(
        [
            layers.Input((4,)),
            layers.Dense(3, name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(1, name="out"),
        ],
        name="model",
    )
    model.compile(optimizer=optimizer(lamb, **arguments), loss="mse")
    return model


def train(model, batches, x, y):
    for batch in batches:
        rows = slice(8 * batch, 8 * batch + 8)
        model.train_on_batch(x[rows], y[rows])


def state(model):
    """The model's and the optimizer's numbers, under the keys of expected.npz."""
    optimizer = model.optimizer
    found = {
        "config": np.array(json.dumps(optimizer.get_config())),
        "iterations": optimizer.iterations.numpy(),
        "skipped_steps": np.array(optimizer.skipped_steps),
    }
    if optimizer.telemetry:
        found["telemetry"] = optimizer.telemetry_rows
    lists = {"weights": model.weights}
    lists |= dict(zip(optimizer.slot_names, optimizer._plan.slots, strict=True))
    if optimizer.use_ema:
        lists["ema"] = optimizer._model_variables_moving_average
    if getattr(optimizer, "gradient_accumulation_steps", None):
        lists["accumulated"] = optimizer._accumulated_gradients
    for name, variables in lists.items():
        found |= {f"{name}/{i}": v.numpy() for i, v in enumerate(variables)}
    return found


def save(model, flavour, stem):
    """Writes the files of one case; `stem` is WORK/FLAVOUR/CASE."""
    model.save(f"{stem}.keras")
    if flavour == "keras3":
        model.save_weights(f"{stem}.weights.h5")
    else:
        model.save(f"{stem}.h5", save_format="h5")
        model.save_weights(f"{stem}.weights", save_format="tf")
        if stem.name == "lamb":
            model.save(f"{stem}.saved_model", save_format="tf")
    if flavour == "tf_keras" or stem.name == "lamb":
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        checkpoint.write(f"{stem}.checkpoint")


def configs(flavour):
    """`get_config()` of optimizers that together set every argument off its default."""
    lamb = FLAVOURS[flavour][1]
    common = {
        "exclude_from_weight_decay": EXCLUDED,
        "exclude_from_layer_adaptation": ["bias$"],
        "norm": "l1",
        "layer_axes": {"hidden/kernel": 1, "stacked": (0, 2)},
        "layer_groups": ["norm/(gamma|beta)"],
        "moment_dtype": "bfloat16",
        "skip_nonfinite": False,
        "telemetry": True,
        "use_ema": True,
        "ema_momentum": 0.95,
        "ema_overwrite_frequency": 7,
    }
    if flavour == "keras3":
        common |= {"loss_scale_factor": 128.0, "gradient_accumulation_steps": 4}
    else:
        common |= {"jit_compile": False}
    phases = [
        {"peak_learning_rate": 0.1, "warmup_steps": 2, "total_steps": 10, "decay_from": 0},
        {"peak_learning_rate": 0.2, "warmup_steps": 1, "total_steps": 9, "decay_steps": [4, 6]},
    ]
    optimizers = {
        "LAMB": lamb.LAMB(
            lamb.WarmupPolynomialDecay(
                0.1, 4, 20, 0.01, power=2.0, decay_from=1, name="rate", warmup_from=-1
            ),
            beta_1=0.8,
            beta_2=0.99,
            epsilon=1e-5,
            weight_decay=0.02,
            bias_correction=False,
            nesterov="both",
            weight_norm_bounds=(0.5, 10.0),
            unit_gradient=True,
            based_on="nn-lamb",
            name="own_lamb",
            **common,
        ),
        "LAMB_clipnorm": lamb.LAMB(lamb.Phases(phases, name="phases"), clipnorm=0.5),
        "LAMB_clipvalue": lamb.LAMB(0.02, clipvalue=0.5, exclude_from_layer_adaptation=[]),
        "LAMB_defaults": lamb.LAMB(),
        "LAMB_nvlamb": lamb.LAMB.variant("nvlamb"),
        "LARS": lamb.LARS(
            lamb.WarmupStepDecay(0.1, 2, 20, [5, 9], decay_factor=0.5, name="rate"),
            momentum=0.8,
            weight_decay=2e-4,
            trust_coefficient=0.01,
            epsilon=1e-9,
            nesterov=True,
            form="tf-models-scaled",
            global_clipnorm=2.0,
            based_on="tf-models-scaled",
            name="own_lars",
            **common,
        ),
        "LARS_defaults": lamb.LARS(),
    }
    return {name: optimizer.get_config() for name, optimizer in optimizers.items()}


def pack(work, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for file in sorted(work.rglob("*")):
            # "checkpoint" is TensorFlow's note of a folder's newest one; nothing here reads it.
            if file.is_file() and file.name != "checkpoint":
                archive.write(file, file.relative_to(work))


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    x, y = data()
    expected = {"x": x, "y": y}
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        for flavour, cases in CASES.items():
            (work / flavour).mkdir()
            for case in cases:
                model = make_model(flavour, case)
                train(model, BEFORE, x, y)
                prefix = f"{flavour}/{case}/"
                expected |= {prefix + key: value for key, value in state(model).items()}
                save(model, flavour, work / flavour / case)
                train(model, AFTER, x, y)
                later = state(model)
                for key in ("iterations", *(key for key in later if key.startswith("weights/"))):
                    expected[f"{prefix}after/{key}"] = later[key]
        pack(work, folder / "files.zip")
    np.savez_compressed(folder / "expected.npz", **expected)
    text = json.dumps({flavour: configs(flavour) for flavour in FLAVOURS}, indent=1)
    (folder / "config.json").write_text(text + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
