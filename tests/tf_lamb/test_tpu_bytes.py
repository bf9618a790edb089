"""How much memory an update reads and writes, as the TPU compiler counts. No TPU is needed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Floats per parameter. LAMB reads g, m, v and x and writes m and v, then reads m, v and x and
# writes x; LARS reads g and x, then g, x and m, and writes x and m. One more reads the gradients
# before anything is written, for their global norm or, in LAMB, to see that they are finite.
LEAST = {
    "lamb": {"plain": 10, "telemetry": 10, "global_clipnorm": 11, "skip_nonfinite": 11},
    "lars": {"plain": 7, "telemetry": 7, "global_clipnorm": 8, "skip_nonfinite": 7},
}
SCALARS = 0.05  # the norms and ratios of the layers, and the padding of small tensors
# libtpu and JAX read their configuration once, when they are loaded, so this is a new process.
SCRIPT = """
import json
import sys
from benchmarks import shapes, tpu_bytes

# One tensor of each kind: the compiler takes a quarter of a second for each tensor and case.
kinds = (
    "embeddings/word",
    "layer_0/attention/query/kernel",
    "layer_0/attention/query/bias",
    "layer_0/intermediate/kernel",
    "layer_0/intermediate/bias",
    "layer_0/layer_norm/gamma",
)
layers = [layer for layer in shapes.bert_base(vocabulary=8192, blocks=1) if layer[0] in kinds]
assert len(layers) == len(kinds)
excluded = shapes.EXCLUDED["bert-base"]
device = tpu_bytes.tpu()
newer = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def plain(topology):
    device = tpu_bytes.tpu(topology)
    return tpu_bytes.our_figures("lamb", "plain", layers, excluded, device)["moved"]


moved = {topology: plain(topology) for topology in newer}
moved |= {
    rule: {
        case: tpu_bytes.our_figures(rule, case, layers, excluded, device)["moved"]
        for case in cases
    }
    for rule, cases in json.loads(sys.argv[1]).items()
}
print(json.dumps(moved))
"""

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "libtpu")),
    reason="JAX and libtpu, the extra `preflight`, are not installed",
)


@pytest.fixture(scope="module")
def moved():
    """Floats per parameter, by rule and case."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(LEAST)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("rule", LEAST)
@pytest.mark.parametrize("case", LEAST["lamb"])
def test_an_update_moves_the_least_that_is_possible(moved, rule, case):
    least = LEAST[rule][case]
    # A smaller number would mean that the compiler saw only a part of the update.
    assert least - SCALARS < moved[rule][case] < least + SCALARS


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_from_v4_on_no_more_than_that_is_hbm_traffic(moved, topology):
    # Gradient, moments and weights are read and the latter two written. What the second pass reads
    # may still be on the chip, whose traffic the compiler's own count includes.
    assert 7 - SCALARS < moved[topology] < LEAST["lamb"]["plain"] + SCALARS
