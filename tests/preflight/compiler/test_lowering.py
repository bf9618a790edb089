"""The training step of BERT-base lowers with XLA at its real shapes: forward, backward, update."""

import dataclasses
import re

import pytest
import tensorflow as tf

from benchmarks import lowering
from models import bert
from preflight.compiler import program
from recipes import find_recipe, override

LAYERS = 2  # instead of 12: the others only repeat the same shapes
VARIABLES = 14 + 16 * LAYERS


@pytest.mark.slow
def test_the_step_of_bert_base_is_lowered(monkeypatch):
    size = dataclasses.replace(bert.SIZES["base"], layers=LAYERS)
    monkeypatch.setitem(bert.SIZES, "base", size)
    recipe = find_recipe("bert-base")
    second = dataclasses.replace(recipe, phases=recipe.phases[1:])
    lines = []
    (program,) = lowering.measure(lowering.replica_recipe(second, 32), lines.append)
    assert re.search(r"phase 1: batch 8 per replica, \(8, 512\): .* peak memory", lines[-1])
    assert re.match(r"bert-base: 39,\d{3},\d{3} parameters", lines[0])
    # XLA reuses the buffers of the weights and of both slots.
    head = program[: program.index("entry_computation_layout")]
    assert head.count("may-alias") >= 3 * VARIABLES
    # 8 matrix products per layer forward, and two for each of them backward, in bfloat16.
    assert len(re.findall(r"= bf16\[[\d,]*\]\S* dot\(", program)) >= LAYERS * 8 * 3
    assert "s32[8,512]" in program and "<=" not in head  # no dynamic sizes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_in_the_recipes_dtype(dtype):
    fields = ["vocabulary_size=50", "sequence_length=16", "predictions=2", f"sum_dtype={dtype}"]
    recipe = override(find_recipe("bert-mini-demo"), [*fields, "max_sequence_length=16"])
    replica = program.Replica(recipe, 0, replicas=2)
    graph = replica.traced_step(2).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    sums = [node.attr["T"].type for node in nodes if node.op == "XlaAllReduce"]
    gradients = [kind for kind in sums if kind == tf.as_dtype(dtype).as_datatype_enum]
    assert len(gradients) >= len(replica.model.trainable_variables)
    other = {"float32": tf.bfloat16, "bfloat16": tf.float32}[dtype].as_datatype_enum
    assert sums.count(other) <= 2  # the divisors of the loss stay float32


def test_a_batch_that_does_not_divide_by_the_replicas_is_an_error(capsys):
    assert lowering.main(["--recipe=bert-base", "--replicas=3"]) == 1
    error = capsys.readouterr().err
    assert "--replicas=3 does not divide phase 1's global_batch_size=256" in error
    with pytest.raises(ValueError, match="Did you mean 'bert-base'"):
        find_recipe("bert-bas")
