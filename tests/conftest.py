"""Two CPU devices for every test, and the two flavours of Keras as a fixture."""

import os
import types

import pytest

# Before anything imports TensorFlow or Keras.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

REPLICAS = ["CPU:0", "CPU:1"]


@pytest.fixture(scope="session", autouse=True)
def two_cpus():
    """Splits the CPU in two, which TensorFlow allows only before its first operation."""
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


@pytest.fixture(scope="session")
def mirrored(two_cpus):
    """A strategy of two replicas."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(REPLICAS)


def _keras3():
    import keras

    import tf_lamb.keras3

    return types.SimpleNamespace(
        name="keras3",
        keras=keras,
        lamb=tf_lamb.keras3,
        Variable=keras.Variable,
        name_scope=keras.name_scope,
    )


def _tf_keras():
    import tensorflow as tf
    import tf_keras

    import tf_lamb.tf_keras

    return types.SimpleNamespace(
        name="tf_keras",
        keras=tf_keras,
        lamb=tf_lamb.tf_keras,
        Variable=tf.Variable,
        name_scope=tf.name_scope,
    )


FLAVOURS = {"keras3": _keras3, "tf_keras": _tf_keras}


@pytest.fixture(scope="session", params=FLAVOURS)
def flavour(request, two_cpus):
    """One flavour: its `keras`, its `lamb` (our classes), its `Variable` and `name_scope`."""
    return FLAVOURS[request.param]()


@pytest.fixture(scope="session")
def keras3(two_cpus):
    """For what tf_keras does not have."""
    return _keras3()
