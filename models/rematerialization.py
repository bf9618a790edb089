"""Rematerialization: the backward pass computes a layer's activations again, so they are not kept.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

import tensorflow as tf
import tf_keras
from tf_keras.src.engine.base_layer_utils import call_context


def rematerialize(layer: tf_keras.layers.Layer) -> None:
    """Changes a built layer so that in training only its inputs are kept for the backward pass.

    Random layers in it must draw the same numbers in both passes (`training.dropout`).

    Args:
        layer: a layer whose only argument is a list of tensors.
    """
    call = layer.call

    def call_twice(inputs, **unused):
        arguments = call_context().call_context_args
        if not arguments.get("training"):
            return call(inputs, **unused)

        # In the backward pass no layer is being called, so Keras would not know that it is
        # training.
        def forward(*tensors):
            with call_context().enter(layer, tensors, True, arguments):
                return call(list(tensors))

        return tf.recompute_grad(forward)(*inputs)

    layer.call = call_twice
