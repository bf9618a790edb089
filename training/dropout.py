"""Dropout whose masks follow from (seed, step, replica, micro-batch), so nothing of it is saved."""

import contextlib

import tensorflow as tf
import tf_keras
from tf_keras.src.backend import RandomGenerator


class StepSeed:
    """Gives every random layer of a model, such as dropout, its seed of the step at hand.

    Keras's layers draw from a state that XLA keeps to itself and no checkpoint holds. Here each
    layer's `_random_generator` is exchanged for one that derives a seed from the step's. A layer
    that one step calls twice draws the same mask twice, which a recomputed forward pass needs.

    Args:
        model: a built tf_keras model; its layers are changed.
    """

    def __init__(self, model: tf_keras.Model):
        self._current = None
        layer_class = tf_keras.__internal__.layers.BaseRandomLayer
        layers = [layer for layer in model.submodules if isinstance(layer, layer_class)]
        for number, layer in enumerate(layers):
            layer._random_generator = LayerGenerator(self, number)

    @contextlib.contextmanager
    def set_to(self, seed):
        """While inside, layers draw from `seed`, [2] int32, as `stateless_fold_in` gives it."""
        self._current = seed
        try:
            yield
        finally:
            self._current = None

    def of_layer(self, number: int):
        """[2] int32, the seed of the layer of that number."""
        if self._current is None:
            raise RuntimeError("A random layer was called in training mode outside of a step.")
        return tf.random.experimental.stateless_fold_in(self._current, number)


class LayerGenerator(RandomGenerator):
    """Draws the numbers of the layer of that number; all but dropout's by Keras's own methods."""

    def __init__(self, step_seed: StepSeed, number: int):
        super().__init__(seed=0, rng_type=RandomGenerator.RNG_STATELESS)
        self._of_layer = lambda: step_seed.of_layer(number)

    def make_seed_for_stateless_op(self):
        """[2] int32, where Keras asks for it."""
        return self._of_layer()

    def dropout(self, inputs, rate, noise_shape=None):
        """`inputs` with each number 0 by the chance `rate`, to the nearest 1/65,536.

        A random word serves two numbers, and is compared as the integer it is: on a TPU
        dropout's random bits are a tenth of a BERT-Large layer's time, and these half of that.
        """
        if noise_shape is not None or not inputs.shape.is_fully_defined():
            return super().dropout(inputs, rate, noise_shape)
        dropped = min(round(rate * 2**16), 2**16 - 1)
        kept = _by_chance(self.make_seed_for_stateless_op(), inputs.shape, dropped)
        scaled = inputs * tf.cast(2**16 / (2**16 - dropped), inputs.dtype)
        return tf.where(kept, scaled, tf.zeros_like(inputs))


def _by_chance(seed, shape, dropped: int):
    """bool of that static shape, False by the chance `dropped` in 65,536."""
    # Attention's scores, [B, heads, to, from], are made of keys times queries, so that they lie in
    # memory as [B, heads, from, to]. What is drawn in another order, a TPU copies.
    transposed = len(shape) == 4
    rows, *others = [*shape[:2], shape[3], shape[2]] if transposed else shape
    words = tf.random.stateless_uniform([(rows + 1) // 2, *others], seed, None, None, tf.uint32)
    halves = tf.bitwise.bitwise_and(words, 0xFFFF), tf.bitwise.right_shift(words, 16)
    kept = tf.concat([tf.bitcast(half, tf.int32) >= dropped for half in halves], 0)[:rows]
    return tf.transpose(kept, [0, 1, 3, 2]) if transposed else kept


def replica_seed(seed: int, step, replica):
    """[2] int32, other for each replica and step.

    Args:
        seed: int in [0, 2**32), the run's.
        step: integer scalar, steps made so far.
        replica: integer scalar, this replica's number in the whole run.
    """
    fold = tf.random.experimental.stateless_fold_in
    start = tf.bitcast(tf.constant([seed, 0], tf.uint32), tf.int32)
    return fold(fold(start, tf.cast(step, tf.int32)), tf.cast(replica, tf.int32))
