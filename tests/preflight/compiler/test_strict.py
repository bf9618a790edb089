"""The check of TensorFlow's TPU kernels, with made-up kernels in place of the TPU wheel's."""

import re
import types

import numpy as np
import tensorflow as tf

from preflight.compiler import program
from preflight.compiler.strict import unsupported_operations, with_variables_as_arguments


def kernel(**allowed):
    """A kernel that allows these dtypes, by attribute name."""

    def values(dtypes):
        dtypes = [dtype.as_datatype_enum for dtype in dtypes]
        return types.SimpleNamespace(list=types.SimpleNamespace(type=dtypes))

    constraints = [
        types.SimpleNamespace(name=name, allowed_values=values(dtypes))
        for name, dtypes in allowed.items()
    ]
    return types.SimpleNamespace(constraint=constraints)


def test_an_operation_without_a_kernel_for_its_type_is_listed_once():
    @tf.function
    def inner(x):
        return tf.unique(x)[0]

    @tf.function
    def outer(x):
        return tf.identity_n([x * x, inner(x)])[0] * x

    graph_def = outer.get_concrete_function(tf.TensorSpec([3], tf.float64)).graph.as_graph_def()
    kernels_of = {
        "Mul": [kernel(T=[tf.float32])],
        "Identity": [kernel(T=[tf.float32]), kernel(T=[tf.float64])],
        "IdentityN": [kernel(T=[tf.float64])],
        "PartitionedCall": [kernel()],
        "StatefulPartitionedCall": [kernel()],
    }
    missing = unsupported_operations(graph_def, kernels_of)
    assert sorted(m.split()[0] for m in missing) == ["Mul", "Unique"]
    assert "Mul (float64) at mul" in missing
    assert not unsupported_operations(
        graph_def, kernels_of | {"Mul": [kernel(T=[tf.float64])], "Unique": [kernel()]}
    )


def test_variables_become_arguments():
    rows, scale = tf.Variable(tf.reshape(tf.range(6.0), [3, 2])), tf.Variable(2.0)

    def function(index):
        scale.assign_add(1.0)
        return tf.gather(rows, index) * scale.read_value() + scale

    traced = tf.function(function).get_concrete_function(tf.TensorSpec([2], tf.int32))
    again, specs = with_variables_as_arguments(traced)
    given = {(): 10.0, (3, 2): -rows.numpy(), (2,): np.array([2, 0], np.int32)}
    (result,) = again(*(tf.constant(given[tuple(spec.shape)], spec.dtype) for spec in specs))
    # The write was removed, so the scale is 10, not 11.
    np.testing.assert_array_equal(result, -rows.numpy()[[2, 0]] * 10.0 + 10.0)
    assert scale.numpy() == 2.0


def test_random_bits_are_lowered_as_by_tensorflow_tpu():
    def lowered(**arguments):
        """The HLO, and the operations on all of its elements."""
        function = tf.function(
            lambda seed: tf.random.stateless_uniform([8, 128], seed, **arguments), jit_compile=True
        )
        with program._tpu_random_bits():
            lower = function.experimental_get_compiler_ir(tf.TensorSpec([2], tf.int32))
            text = lower(stage="hlo")
        names = re.findall(r"= \w+\[8,128\]\{1,0\} ([\w-]+)\(", text)
        return text, [name for name in names if name not in ("reshape", "get-tuple-element")]

    # What the kernels of tensorflow-tpu 2.20.0 lower to for a TPU; all generations accept it.
    generator = (
        r"\(u64\[2\]\{0\}, u32\[8,128\]\{1,0\}\) rng-bit-generator\(u64\[2\]\{0\} \S+\), "
        "algorithm=rng_default"
    )
    text, operations = lowered(minval=None, maxval=None, dtype=tf.uint32)
    assert re.search(generator, text) and operations == []
    text, operations = lowered()
    assert re.search(generator, text)
    computed = [name for name in operations if name != "broadcast"]
    assert computed[:3] == ["shift-right-logical", "convert", "multiply"]
    assert "constant(9)" in text and "constant(1.1920929e-07)" in text  # 2**-23
