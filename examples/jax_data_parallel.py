"""Keras on JAX: LAMB with `keras.distribution.DataParallel` over several devices.

It shows that LAMB needs no change for data parallelism: set the distribution before the model is
made, and `fit` splits each batch over the devices. The script makes four virtual devices of the
CPU, so it runs anywhere. The data is made up.

Install in the project's folder, and run (about 15 seconds on two cores):

    pip install . jax
    python examples/jax_data_parallel.py

It prints the devices, the loss and accuracy of each epoch, and on how many devices the weights
are.
"""

import argparse
import os

# All of these must be set before Keras and JAX are imported.
os.environ["KERAS_BACKEND"] = "jax"
# Four virtual devices on the CPU. Delete these two lines on a machine with GPUs or TPUs.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import keras
import numpy as np

import tf_lamb

FEATURES = 32
CLASSES = 10
GLOBAL_BATCH_SIZE = 256  # over all devices; must be divisible by their number


def make_examples(count):
    """Returns float32 features [count, FEATURES] and int labels [count]."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(count, FEATURES)).astype("float32")
    weights = rng.normal(size=(FEATURES, CLASSES))
    return features, np.argmax(features @ weights, axis=1)


def main(epochs=5, steps_per_epoch=40):
    """Trains a small network on all devices."""
    devices = keras.distribution.list_devices()
    print(f"{len(devices)} devices: {', '.join(devices)}")
    # The model's variables are created on all devices.
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input([FEATURES]),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(CLASSES),
        ]
    )
    total_steps = epochs * steps_per_epoch
    model.compile(
        optimizer=tf_lamb.LAMB(
            tf_lamb.WarmupPolynomialDecay(0.02, total_steps // 10, total_steps),
            exclude_from_weight_decay=tf_lamb.BERT_EXCLUSIONS,
            # Clips the gradient of the global batch, not each device's own.
            global_clipnorm=1.0,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    features, labels = make_examples(GLOBAL_BATCH_SIZE * steps_per_epoch)
    model.fit(features, labels, batch_size=GLOBAL_BATCH_SIZE, epochs=epochs, verbose=2)

    kernel = model.layers[0].kernel.value  # a `jax.Array`
    print(f"The weights are on {len(kernel.sharding.device_set)} devices.")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    main()
