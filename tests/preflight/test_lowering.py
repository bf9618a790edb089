"""The step that is trained has an XLA form at its true shapes, forward, backward and update."""

import dataclasses
import re

import pytest

from benchmarks import lowering
from recipes import find_recipe


def test_bert_bases_step_is_lowered():
    recipe = find_recipe("bert-base")
    second = dataclasses.replace(recipe, phases=recipe.phases[1:])
    said = []
    (program,) = lowering.measure(lowering.replica_recipe(second, 32), said.append)
    assert re.search(r"phase 1: batch 8 per replica, \(8, 512\): .* peak memory", said[-1])
    assert "109," in said[0] or "110," in said[0]
    # Weights and both slots of 206 variables are written where they stood.
    head = program[: program.index("entry_computation_layout")]
    assert head.count("may-alias") >= 3 * 206
    # 12 layers of 8 matrix products, forward, and two for each, backward, in bfloat16.
    assert len(re.findall(r"= bf16\[[\d,]*\]\S* dot\(", program)) >= 12 * 8 * 3
    assert "s32[8,512]" in program and "<=" not in head  # no bound, so no dynamic size


def test_a_batch_that_the_replicas_cannot_share(capsys):
    assert lowering.main(["--recipe=bert-base", "--replicas=3"]) == 1
    said = capsys.readouterr().err
    assert "--replicas=3 does not divide phase 1's global_batch_size=256" in said
    with pytest.raises(ValueError, match="Did you mean 'bert-base'"):
        find_recipe("bert-bas")
