"""Whether TensorFlow for TPUs has all that a step needs: a process of `.venv-tpu`'s Python.

The stock TensorFlow lowers for a CPU, whose kernels are not all there for a TPU. The wheel
`tensorflow-tpu` brings the TPU's own, which need no TPU to be asked. It lowers no function that
writes variables unless a TPU holds them, so the step is looked at twice: each operation of the
whole step, update and sums over the replicas included, must have a kernel for its types; and
forward and backward, the weights given as arguments, are lowered with these kernels.
"""

import dataclasses
import json
import operator
import os
import pickle
import sys

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU is asked for
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from tensorflow.python.framework import kernels

from preflight.program import Replica

PLATFORM, KERNELS = "TPU", "XLA_TPU_JIT"
# Which operations there are does not depend on the size of the network.
SMALL = {"bert": "tiny", "squad": "tiny", "resnet": "resnet-50-narrow"}
EXAMPLES = 4  # of a replica
FUNCTIONS = operator.attrgetter("library.function")  # of a graph
WRITES = {"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"}
# The compiler's own: arguments and results.
STRUCTURE = {"Placeholder", "_Arg", "_Retval", "NoOp"}


def registered() -> dict[str, list]:
    """operation: its kernels for a TPU's compiler, which are known once it was used."""
    trivial = tf.function(lambda x: x + 1.0, jit_compile=True)
    lower = trivial.experimental_get_compiler_ir(tf.TensorSpec([], tf.float32))
    lower(stage="hlo_serialized", platform_name=PLATFORM)
    found: dict[str, list] = {}
    for kernel in kernels.get_all_registered_kernels().kernel:
        if kernel.device_type == KERNELS:
            found.setdefault(kernel.op, []).append(kernel)
    return found


def fits(kernel, node) -> bool:
    """Whether the kernel takes the node's types."""
    allowed = {c.name: set(c.allowed_values.list.type) for c in kernel.constraint}
    return all(set(types_of(node.attr[name])) <= types for name, types in allowed.items())


def types_of(attribute) -> list[int]:
    """The types that a node's attribute names: of one tensor, or of several."""
    return list(attribute.list.type) or [attribute.type]


def without_kernel(graph_def, known: dict[str, list]) -> list[str]:
    """What no kernel takes, an example each: operation (types) at node."""
    functions = {function.signature.name: function for function in FUNCTIONS(graph_def)}
    nodes = [*graph_def.node, *(n for f in functions.values() for n in f.node_def)]
    missing = {}
    for node in nodes:
        if node.op in STRUCTURE or node.op in functions:
            continue
        if not any(fits(kernel, node) for kernel in known.get(node.op, ())):
            types = [tf.as_dtype(a.type).name for a in node.attr.values() if a.type]
            said = f"{node.op} ({', '.join(types)})" if types else node.op
            missing.setdefault(said, f"{said} at {node.name}")
    return list(missing.values())


def of_arguments(traced):
    """A function of the same results whose variables are arguments; it writes none.

    Args:
        traced: a concrete function that reads its variables in its own graph.

    Returns:
        A `tf.function` for XLA, and the `tf.TensorSpec`s that it takes.
    """
    weights = {
        inner.op.name: variable
        for variable in traced.graph.variables
        for outer, inner in traced.graph.captures
        if outer is variable.handle
    }
    graph_def = _without_variables(traced.graph.as_graph_def(), weights)
    specs = {
        f"{node.name}:0": tf.TensorSpec(
            node.attr["shape"].shape, tf.as_dtype(node.attr["dtype"].type)
        )
        for node in graph_def.node
        if node.op == "Placeholder"
    }
    wrapped = tf.compat.v1.wrap_function(
        lambda: tf.graph_util.import_graph_def(graph_def, name=""), []
    )
    pruned = wrapped.prune(list(specs), [output.name for output in traced.outputs])
    function = tf.function(lambda *values: pruned(*values), jit_compile=True, autograph=False)
    return function, list(specs.values())


def _without_variables(source, weights):
    """A graph in which each resource of `weights` is a tensor of its variable's shape and type."""
    result = tf.compat.v1.GraphDef()
    result.CopyFrom(source)
    result.ClearField("node")
    axis = result.node.add(name="axis_0", op="Const")
    axis.attr["dtype"].type = tf.int32.as_datatype_enum
    axis.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(0))
    gone = {f"^{node.name}" for node in source.node if node.op in WRITES}
    for node in source.node:
        if f"^{node.name}" in gone:
            continue
        new = result.node.add(name=node.name, op=node.op)
        new.input.extend(name for name in node.input if name not in gone)
        new.attr.MergeFrom(node.attr)
        if node.name in weights:
            variable = weights[node.name]
            new.attr["dtype"].type = variable.dtype.as_datatype_enum
            new.attr["shape"].shape.CopyFrom(variable.shape.as_proto())
        elif node.op == "ReadVariableOp":
            new.op = "Identity"
            new.attr["T"].type = new.attr.pop("dtype").type
        elif node.op == "ResourceGather":
            new.op = "GatherV2"
            new.input.append(axis.name)
            new.attr["Tparams"].type = new.attr.pop("dtype").type
            new.attr["Taxis"].type = tf.int32.as_datatype_enum
            new.attr.pop("validate_indices")
    return result


def examine(recipe, number: int) -> dict:
    """What the kernels say of a recipe's phase, from 0.

    Returns:
        operations: how many kinds the step has. error: one sentence, what has no kernel or why
            forward and backward cannot be lowered; or None.
    """
    known = registered()
    recipe = dataclasses.replace(recipe, model=SMALL[recipe.task])
    if hasattr(recipe, "init_from"):  # its checkpoint is of the size that the recipe had
        recipe = dataclasses.replace(recipe, init_from="random")
    replica = Replica(recipe, number, replicas=2)
    graph_def = replica.traced_step(EXAMPLES * recipe.accumulation).graph.as_graph_def()
    kinds = {n.op for n in graph_def.node}
    kinds |= {n.op for f in FUNCTIONS(graph_def) for n in f.node_def}
    missing = without_kernel(graph_def, known)
    error = f"TensorFlow has no TPU kernel for {'; '.join(missing)}" if missing else None
    try:
        function, specs = of_arguments(replica.traced_gradients(EXAMPLES))
        lower = function.experimental_get_compiler_ir(*specs)
        lower(stage="hlo_serialized", platform_name=PLATFORM)
    except (tf.errors.OpError, ValueError) as reason:
        error = error or str(reason).strip().splitlines()[0]
    return {"operations": len(kinds - STRUCTURE), "error": error}


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as job:
        answer = examine(**pickle.load(job))
    with open(sys.argv[2], "w", encoding="utf-8") as out:
        json.dump(answer, out)
