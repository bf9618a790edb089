"""The check of TensorFlow's TPU kernels, with made-up kernels in place of the TPU wheel's."""

import re
import types

import numpy as np
import tensorflow as tf

from preflight import program
from preflight.strict import unsupported_operations, with_variables_as_arguments


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
    seed = tf.TensorSpec([2], tf.int32)

    def lowered(dtype):
        function = tf.function(
            lambda seed: (
                tf.random.stateless_uniform([8, 128], seed, None, None, dtype)
                if dtype == tf.uint32
                else tf.random.stateless_uniform([8, 128], seed)
            ),
            jit_compile=True,
        )
        with program._tpu_random_bits():
            return function.experimental_get_compiler_ir(seed)(stage="hlo")

    # Of what tensorflow-tpu 2.20.0 lowers for a TPU, the operations on all elements.
    generator = r"rng-bit-generator\(u64\[2\]\{0\} \S+\), algorithm=rng_default"
    for text in (lowered(tf.uint32), lowered(tf.float32)):
        assert re.search(r"\(u64\[2\]\{0\}, u32\[8,128\]\{1,0\}\) " + generator, text)
    assert not re.search(r"u32\[8,128\]\S* (?!rng|get-tuple|reshape)\w+\(", lowered(tf.uint32))
    names = re.findall(r"= \w+\[8,128\]\{1,0\} ([\w-]+)\(", lowered(tf.float32))
    kept = [name for name in names if name in ("shift-right-logical", "or", "convert", "subtract")]
    assert kept == ["shift-right-logical", "convert"]
    assert "constant(1.1920929e-07)" in lowered(tf.float32)  # 2**-23
