"""One run of a small Keras model: `model.compile` with the optimizer, `fit`, `evaluate`.

This runs on every Keras backend; KERAS_BACKEND selects it. With JAX, TensorFlow need not be
installed, except to read CIFAR-10 from PNG strips.
"""

import math

import keras

import tf_lamb
from experiments import datasets, networks
from experiments.grid import Cell
from inputs.errors import InputError

EVALUATION_BATCH = 2_000
MOMENTUM = 0.9


def make_optimizer(settings: dict, schedule) -> keras.optimizers.Optimizer:
    """Returns the optimizer that `settings["optimizer"]` names.

    Biases and normalization parameters are excluded from weight decay and trust ratios, as in the
    author's programs. All other arguments are the defaults, except for `MOMENTUM`.

    Args:
        settings: `optimizer` is "lamb", "lars", "momentum", "nesterov", "adagrad", "adam" or
            "adamw". `weight_decay` is λ of LAMB and LARS, or Keras's decoupled weight decay.
        schedule: the learning rate, a schedule or a float.
    """
    name = settings["optimizer"]
    excluded = tf_lamb.RESNET_EXCLUSIONS
    decay = {"weight_decay": settings.get("weight_decay")}
    ours = {"exclude_from_weight_decay": excluded, "adapt_undecayed": False, "telemetry": True}
    if name == "lamb":
        return tf_lamb.LAMB(schedule, **decay, **ours)
    if name == "lars":
        return tf_lamb.LARS(schedule, momentum=MOMENTUM, **decay, **ours)
    makers = {
        "momentum": lambda: keras.optimizers.SGD(schedule, momentum=MOMENTUM, **decay),
        "nesterov": lambda: keras.optimizers.SGD(
            schedule, momentum=MOMENTUM, nesterov=True, **decay
        ),
        "adagrad": lambda: keras.optimizers.Adagrad(schedule, **decay),
        "adam": lambda: keras.optimizers.Adam(schedule, **decay),
        "adamw": lambda: keras.optimizers.AdamW(schedule, **decay),
    }
    optimizer = makers[name]()
    if decay["weight_decay"]:
        # Keras compares these with the last part of a variable's path.
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def make_model(settings: dict, seed: int) -> keras.Model:
    """Returns the network that `settings["model"]` names: lenet5, mnist_cnn or davidnet."""
    if settings["model"] == "davidnet":
        return networks.davidnet(settings["width"])
    return {"lenet5": networks.lenet5, "mnist_cnn": lambda: networks.mnist_cnn(seed)}[
        settings["model"]
    ]()


def run(cell: Cell, data_dir: str, records: str, say=print) -> dict:
    """Trains and evaluates one cell.

    Args:
        cell: its settings are `model` (and `width` for davidnet), `data`, `optimizer`,
            `weight_decay`, `batch`, `epochs`, `warmup_steps`, `power`, `crop` and `dtype`: the
            name of a Keras dtype policy, float32 by default.
        data_dir: as in `datasets.load`.
        records: a folder for the trust ratios of LAMB and LARS.
        say: receives a line for each epoch.

    Returns:
        A dictionary with `images`: the numbers of images for training and for the test; `curve`:
        name -> list of values, one per epoch; and `result`: `accuracy` and `loss` on the test set
        after the last epoch, and `diverged`.

    Raises:
        InputError: the data cannot be read, or are too few for the warm-up.
    """
    settings = dict(cell.group.settings)
    keras.utils.set_random_seed(cell.seed)
    keras.config.set_dtype_policy(settings.get("dtype", "float32"))
    train = datasets.load(settings["data"], data_dir, "train")
    test = datasets.load(settings["data"], data_dir, "validation")
    images = [len(train[0]), len(test[0])]
    batch = settings["batch"]
    epochs = settings["epochs"]
    ends = [round(epoch * len(train[0]) / batch) for epoch in range(epochs + 1)]
    if ends[-1] <= settings["warmup_steps"] or not len(test[0]):
        raise InputError(
            f"--data_dir: {data_dir} has {len(train[0]):,} images for training and "
            f"{len(test[0]):,} for the test, too few for the {settings['warmup_steps']} steps of "
            f"warm-up at batch {batch:,}. Give the whole set as it was published."
        )
    schedule = tf_lamb.WarmupPolynomialDecay(
        cell.rate, settings["warmup_steps"], ends[-1], power=settings["power"]
    )
    model = make_model(settings, cell.seed)
    optimizer = make_optimizer(settings, schedule)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        # On a CPU, TensorFlow's own convolutions are faster than those of XLA.
        jit_compile=keras.backend.backend() != "tensorflow",
    )
    callbacks = []
    if settings["optimizer"] in ("lamb", "lars"):
        every = max(1, ends[-1] // 30)
        callbacks = [tf_lamb.TelemetryCallback(records, every_steps=every, heat_map=False)]
    curve = {"step": [], "loss": [], "accuracy": [], "test_loss": [], "test_accuracy": []}
    for epoch, steps in enumerate(zip(ends, ends[1:], strict=False)):
        batches = datasets.Batches(*train, batch, steps, cell.seed, settings.get("crop", False))
        if not len(batches):  # a batch larger than an epoch
            continue
        history = model.fit(
            batches,
            initial_epoch=epoch,
            epochs=epoch + 1,
            verbose=0,
            callbacks=callbacks,
            shuffle=False,  # of the batches, in an order that depends on the backend
        ).history
        test_loss, test_accuracy = model.evaluate(*test, batch_size=EVALUATION_BATCH, verbose=0)
        values = (history["loss"][0], history["accuracy"][0], test_loss, test_accuracy)
        for name, value in zip(curve, (steps[1], *values), strict=True):
            curve[name].append(round(float(value), 6))
        say(f"epoch {epoch + 1}: loss {values[0]:.4f}, test accuracy {test_accuracy:.4f}")
        if not math.isfinite(values[0]):
            break
    diverged = not all(map(math.isfinite, (*curve["loss"], *curve["test_loss"])))
    result = {"accuracy": curve["test_accuracy"][-1], "loss": curve["test_loss"][-1]}
    return {"images": images, "curve": curve, "result": {**result, "diverged": diverged}}
