"""Trains `keras.applications.ResNet50` with LARS: warm-up, polynomial decay, a scaled batch size.

It shows three things that a large-batch run of ResNet-50 needs: a schedule known at one batch
size, scaled to another with `scale_batch`; linear warm-up with polynomial decay; and the
exclusions under which biases and batch normalization are neither decayed nor adapted. The images
are tiny and made up, so nothing is downloaded.

Install in the project's folder, and run (under a minute on two cores, most of it before the first
step):

    pip install . tensorflow
    python examples/resnet50_lars.py

It prints the scaled schedule, what LARS does to the first variables, and the loss
and accuracy of each epoch.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: hides its start-up messages

import keras
import numpy as np

import tf_lamb

IMAGE_SIZE = 32
CLASSES = 4
BATCH_SIZE = 16
KNOWN_BATCH_SIZE = 4  # the batch size for which the learning rate below was found


def make_images(count):
    """Returns float32 images [count, size, size, 3] and int labels [count].

    Each class has its own color, under noise.
    """
    rng = np.random.default_rng(1)
    colors = rng.normal(size=(CLASSES, 3))
    labels = rng.integers(CLASSES, size=count)
    noise = rng.normal(size=(count, IMAGE_SIZE, IMAGE_SIZE, 3))
    return (colors[labels][:, np.newaxis, np.newaxis] + noise).astype("float32"), labels


def main(epochs=3, steps_per_epoch=4):
    """Trains the model for a few epochs."""
    keras.utils.set_random_seed(1)

    # The same number of examples as at the known batch size, so four times fewer steps. "linear"
    # is the usual rule for ResNet-50 (Goyal et al., 2017); the LAMB paper takes "sqrt" for BERT.
    factor = BATCH_SIZE // KNOWN_BATCH_SIZE
    scaled = tf_lamb.scale_batch(
        KNOWN_BATCH_SIZE,
        BATCH_SIZE,
        learning_rate=0.25,
        warmup_steps=factor * epochs * steps_per_epoch // 5,
        total_steps=factor * epochs * steps_per_epoch,
        rule="linear",
    )
    print(f"Schedule at batch size {BATCH_SIZE}: {scaled}")
    schedule = tf_lamb.WarmupPolynomialDecay(
        peak_learning_rate=scaled.learning_rate,
        warmup_steps=scaled.warmup_steps,
        total_steps=scaled.total_steps,
        power=2.0,  # MLPerf's for ResNet-50 with LARS
    )

    model = keras.applications.ResNet50(
        weights=None, classes=CLASSES, input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    optimizer = tf_lamb.LARS(
        schedule,
        momentum=0.9,
        weight_decay=1e-4,
        exclude_from_weight_decay=tf_lamb.RESNET_EXCLUSIONS,
    )
    model.compile(
        optimizer=optimizer,
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # XLA's convolutions are slow on a CPU. On a GPU or TPU leave this argument out.
        jit_compile=False,
    )

    # `fit` builds the optimizer too. Building it here shows the decisions before a long run;
    # without `print_fn=` the table is printed. The first ten lines are enough here.
    optimizer.build(model.trainable_variables)
    table = []
    optimizer.layer_table(print_fn=table.append)
    print("\n".join(table[:10]))

    images, labels = make_images(BATCH_SIZE * steps_per_epoch)
    model.fit(images, labels, batch_size=BATCH_SIZE, epochs=epochs, verbose=2)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    main()
