"""A custom TensorFlow training loop with LAMB that records and draws the trust ratios.

It shows LAMB without `fit`: a `tf.function` with a `GradientTape`, a `TelemetryWriter` that
records each layer's trust ratio every few steps, and the heat map (layers x steps) that is drawn
at the end. The data is made up.

Install in the project's folder, and run (about 15 seconds on two cores):

    pip install ".[telemetry]" tensorflow
    python examples/custom_loop.py

It prints the loss every 20 steps and the names of the files written: the records
`logs/trust_ratios.jsonl` and the picture `logs/trust_ratios.png`. TensorBoard shows the same
figures: `tensorboard --logdir=logs`.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow: hides its start-up messages
os.environ["KERAS_BACKEND"] = "tensorflow"  # the loop below is written for this backend

import keras
import tensorflow as tf

import tf_lamb

FEATURES = 32
CLASSES = 10
BATCH_SIZE = 256
LOG_DIR = "logs"


def make_batches():
    """Returns an endless data set of (features [batch, FEATURES], labels [batch])."""
    features = tf.random.stateless_normal([8192, FEATURES], seed=(1, 1))
    weights = tf.random.stateless_normal([FEATURES, CLASSES], seed=(1, 2))
    labels = tf.argmax(features @ weights, axis=1)
    examples = tf.data.Dataset.from_tensor_slices((features, labels))
    return examples.shuffle(8192, seed=1).batch(BATCH_SIZE, drop_remainder=True).repeat()


def main(steps=200):
    """Trains a small network and draws its trust ratios."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.layers.Input([FEATURES]),
            keras.layers.Dense(128, activation="relu", name="hidden_1"),
            keras.layers.Dense(128, activation="relu", name="hidden_2"),
            keras.layers.Dense(CLASSES, name="logits"),
        ]
    )
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = tf_lamb.LAMB(
        tf_lamb.WarmupPolynomialDecay(0.02, warmup_steps=steps // 10, total_steps=steps),
        exclude_from_weight_decay=["bias"],
        telemetry=True,  # keeps each layer's norms and trust ratio during the update
    )
    optimizer.build(model.trainable_variables)

    @tf.function
    def train_step(features, labels):
        with tf.GradientTape() as tape:
            loss = loss_function(labels, model(features, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    # Ratios above `max_ratio` are logged as warnings, with the step and the layer. Steps that are
    # not recorded cost nothing: the writer reads from the device only when it records.
    writer = tf_lamb.TelemetryWriter(LOG_DIR, optimizer, every_steps=5, max_ratio=100.0)
    for step, (features, labels) in enumerate(make_batches().take(steps), start=1):
        loss = train_step(features, labels)
        writer.write(step)
        if step % 20 == 0:
            print(f"step {step}  loss {float(loss):.3f}")
    writer.heat_map()
    writer.close()
    for name in ("trust_ratios.jsonl", "trust_ratios.png"):
        print(f"wrote {os.path.join(LOG_DIR, name)}")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    main()
