"""Checks that TensorFlow has TPU kernels for all operations of a training step.

Runs with the Python of `.venv-tpu`. Stock TensorFlow lowers for a CPU, which has kernels that a TPU
does not have. The wheel `tensorflow-tpu` contains the TPU kernels and needs no TPU to list them. It
cannot lower a function that writes variables unless they are on a TPU, so there are two checks:

- Each operation of the whole step, including update and all-reduces, must have a kernel for its
  types.
- Forward and backward, with the weights as arguments, must lower with these kernels.
"""

import dataclasses
import os

# Without a TPU, libtpu would query a metadata server for minutes.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# libtpu allows one process at a time, because a TPU can be opened once. Here no device is opened.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from tensorflow.python.framework import kernels

from preflight.compiler.program import Replica

PLATFORM = "TPU"  # to lower for
KERNELS = "XLA_TPU_JIT"  # device type of the kernels
# Small models that use the same operations as the recipes' models.
SMALL_MODELS = {"bert": "tiny", "squad": "tiny", "resnet": "resnet-50-narrow"}
EXAMPLES = 4  # per micro-batch
WRITES = {"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"}
# Operations for arguments, results and control flow, which need no kernel.
STRUCTURE = {"Placeholder", "_Arg", "_Retval", "NoOp"}


def registered_kernels() -> dict[str, list]:
    """Returns the TPU kernels of each operation, by operation name."""
    # TensorFlow registers them when it first lowers for a TPU.
    trivial = tf.function(lambda x: x + 1.0, jit_compile=True)
    lower = trivial.experimental_get_compiler_ir(tf.TensorSpec([], tf.float32))
    lower(stage="hlo_serialized", platform_name=PLATFORM)
    found: dict[str, list] = {}
    for kernel in kernels.get_all_registered_kernels().kernel:
        if kernel.device_type == KERNELS:
            found.setdefault(kernel.op, []).append(kernel)
    return found


def supports(kernel, node) -> bool:
    """Returns whether a kernel supports the types of a node."""
    allowed = {c.name: set(c.allowed_values.list.type) for c in kernel.constraint}
    return all(set(types_of(node.attr[name])) <= types for name, types in allowed.items())


def types_of(attribute) -> list[int]:
    """Returns the types in an attribute of a node, which contains one type or a list."""
    return list(attribute.list.type) or [attribute.type]


def unsupported_operations(graph_def, kernels_of: dict[str, list]) -> list[str]:
    """Returns the operations of a graph that no kernel supports.

    Args:
        graph_def: the graph, a `GraphDef`.
        kernels_of: operation name -> kernels, from `registered_kernels`.

    Returns:
        A list of strings "operation (types) at node", one for each operation and its types.
    """
    functions = {function.signature.name: function for function in graph_def.library.function}
    nodes = [*graph_def.node, *(n for f in functions.values() for n in f.node_def)]
    missing = {}
    for node in nodes:
        if node.op in STRUCTURE or node.op in functions:
            continue
        if not any(supports(kernel, node) for kernel in kernels_of.get(node.op, ())):
            types = [tf.as_dtype(a.type).name for a in node.attr.values() if a.type]
            signature = f"{node.op} ({', '.join(types)})" if types else node.op
            missing.setdefault(signature, f"{signature} at {node.name}")
    return list(missing.values())


def with_variables_as_arguments(traced):
    """Turns the variables of a function into arguments, and removes writes to them.

    Args:
        traced: a concrete function that reads its variables in its own graph.

    Returns:
        A tuple: a `tf.function` for XLA with the same results, and the list of `tf.TensorSpec`s of
        its arguments.
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
    """Returns a copy of a `GraphDef` in which variables are tensors.

    Args:
        source: the `GraphDef`.
        weights: name of the placeholder of a variable's resource -> the variable.
    """
    result = tf.compat.v1.GraphDef()
    result.CopyFrom(source)
    result.ClearField("node")
    axis = result.node.add(name="axis_0", op="Const")
    axis.attr["dtype"].type = tf.int32.as_datatype_enum
    axis.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(0))
    removed = {f"^{node.name}" for node in source.node if node.op in WRITES}
    for node in source.node:
        if f"^{node.name}" in removed:
            continue
        new = result.node.add(name=node.name, op=node.op)
        new.input.extend(name for name in node.input if name not in removed)
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


def check_kernels(recipe, phase_index: int) -> dict:
    """Checks the training step of a recipe's phase.

    Args:
        recipe: a checked recipe.
        phase_index: the phase, from 0.

    Returns:
        A dict with `operations`, the number of kinds of operations in the step, and `error`: None,
        or a sentence that names the operations without a kernel or says why forward and backward
        cannot be lowered.
    """
    kernels_of = registered_kernels()
    recipe = dataclasses.replace(recipe, model=SMALL_MODELS[recipe.task])
    if hasattr(recipe, "init_from"):  # the checkpoint does not fit the small model
        recipe = dataclasses.replace(recipe, init_from="random")
    replica = Replica(recipe, phase_index, replicas=2)
    graph_def = replica.traced_step(EXAMPLES * recipe.accumulation).graph.as_graph_def()
    kinds = {n.op for n in graph_def.node}
    kinds |= {n.op for f in graph_def.library.function for n in f.node_def}
    missing = unsupported_operations(graph_def, kernels_of)
    error = f"TensorFlow has no TPU kernel for {'; '.join(missing)}" if missing else None
    try:
        function, specs = with_variables_as_arguments(replica.traced_gradients(EXAMPLES))
        lower = function.experimental_get_compiler_ir(*specs)
        lower(stage="hlo_serialized", platform_name=PLATFORM)
    except (tf.errors.OpError, ValueError) as reason:
        error = error or str(reason).strip().splitlines()[0]
    return {"operations": len(kinds - STRUCTURE), "error": error}
