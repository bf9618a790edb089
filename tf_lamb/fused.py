"""The whole model's update as one XLA program, on TensorFlow; both flavours of Keras run it."""

import tensorflow as tf


def check_strategy(strategy):
    """Raises `ValueError` for a strategy that scatters the variables over machines."""
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise ValueError(
            "A layer's norm needs the whole layer on one device, and ParameterServerStrategy "
            "scatters variables over servers. Use MirroredStrategy, "
            "MultiWorkerMirroredStrategy or TPUStrategy."
        )


def fused_update(updated, variables, slots, jit_compile=True):
    """Returns `run(strategy, index, grads, learning_rate, iterations)`, one update of the model.

    `run` is called where the gradients are already summed over the replicas: in cross-replica
    (merge) context, or without a strategy. It updates every replica's copy on its own device.

    Args:
        updated: `(index, grads, params, slots, learning_rate, step) -> (params, *slots)` on
            lists of tensors (`Layerwise._updated`).
        variables: list of `tf.Variable`, the model's.
        slots: one list of `tf.Variable` per slot, in the order of `variables`.
        jit_compile: whether XLA compiles the update.
    """
    # The lists live in this closure alone, so that no checkpoint finds the model through it.

    def update(index, grads, learning_rate, step):
        chosen_variables = [variables[i] for i in index]
        chosen_slots = [[slot[i] for i in index] for slot in slots]
        values = updated(
            index,
            grads,
            [tf.convert_to_tensor(variable) for variable in chosen_variables],
            [[tf.convert_to_tensor(variable) for variable in slot] for slot in chosen_slots],
            learning_rate,
            step,
        )
        # Reads and writes stand in one program: XLA writes into the buffers it read.
        for targets, results in zip((chosen_variables, *chosen_slots), values, strict=True):
            for target, result in zip(targets, results, strict=True):
                target.assign(result)

    # Keyed on the device of each replica too, so it is traced once per replica device.
    compiled = tf.function(update, jit_compile=jit_compile, autograph=False)

    def run(strategy, index, grads, learning_rate, iterations):
        # A TPU replica's program is XLA already, and nests no second one.
        on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
        one_update = update if on_tpu else compiled

        def on_replica(_, grads, learning_rate):
            one_update(
                index,
                [tf.convert_to_tensor(g) for g in grads],
                tf.cast(tf.convert_to_tensor(learning_rate), tf.float32),
                tf.cast(tf.convert_to_tensor(iterations()), tf.float32) + 1.0,
            )

        # One call, anchored on the first variable, hands each replica its gradients and device.
        strategy.extended.update(
            variables[index[0]], on_replica, args=(grads, learning_rate), group=False
        )

    return run
