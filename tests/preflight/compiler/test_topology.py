"""Topologies: names, sizes and error messages."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from inputs.errors import InputError
from preflight.compiler.topology import Topology, parse_topologies, parse_topology, slices_of
from training.chips import TPU_CHIPS

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "full_name", "chips", "replicas"),
    [
        ("v3-2048", "v3:32x32", 1024, 2048),
        ("V3-8", "v3:2x2", 4, 8),
        ("v3:8X4", "v3:8x4", 32, 64),
        ("v2-512", "v2:16x16", 256, 512),
        ("v4-8", "v4:2x2x1", 4, 4),
        ("v4:1x2x2", "v4:2x2x1", 4, 4),
        ("v5p:2x1x2", "v5p:2x2x1", 4, 4),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v4:4x4x12", "v4:4x4x12", 192, 192),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("V5litepod-1", "v5e:1x1", 1, 1),
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144),
        ("v6e-1", "v6e:1x1", 1, 1),
        ("v6e-8", "v6e:2x4", 8, 8),
        ("v6e:8x16", "v6e:8x16", 128, 128),
    ],
)
def test_a_slice_is_named_by_its_sides_or_its_size(name, full_name, chips, replicas):
    (topology,) = parse_topologies(name)
    assert (topology.name, topology.chips, topology.replicas) == (full_name, chips, replicas)


def test_a_list_has_no_duplicates():
    names = [topology.name for topology in parse_topologies("v3-32, v3:4x4,v4-8,V4:2x2x1")]
    assert names == ["v3:4x4", "v4:2x2x1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "--preflight needs a topology: the sides, such as v3:32x32, or the size"),
        ("v3:-8", "is not the name of a TPU slice; give the sides, such as v3:32x32"),
        ("4x4", "the generation is missing; give v2:4x4, v3:4x4, v5e:4x4 or v6e:4x4."),
        ("2x2x1", "the generation is missing; give v4:2x2x1 or v5p:2x2x1."),
        (
            "5x5",
            "the generation is missing, and no TPU has a slice of 5x5; give a slice such as v3",
        ),
        ("2048", "the generation is missing; give v3-2048, v4-2048 or v5p-2048."),
        ("v3-", "the size is missing; give v3-8 to v3-2048, or the sides, such as v3:2x2."),
        ("v3:", "the size is missing; give v3-8 to v3-2048, or the sides, such as v3:2x2."),
        ("v3", "the size is missing; give v3-8 to v3-2048, or the sides, such as v3:2x2."),
        ("v6e", "the size is missing; give v6e-1 to v6e-256"),
        ("v9:2x2", "v9 is not one of the TPUs v2, v3, v4, v5e, v5p, v6e."),
        ("v5-8", "there are two TPUs v5; give v5e or v5p in its place."),
        ("v6-8", "the TPU v6 is called v6e; give v6e-8."),
        ("V6:2x2", "the TPU v6 is called v6e; give v6e:2x2."),
        ("v6", "the TPU v6 is called v6e; give v6e."),
        ("v3_8", "--preflight=v3_8: give v3-8."),
        ("v4_2x2x1", "give v4:2x2x1."),
        ("v5litepod_16", "give v5litepod-16."),
        ("v9_8", "v9_8 is not one of the TPUs"),
        ("tpu7x-8", "TensorFlow does not support TPU7x, so nothing can be compiled for it."),
        ("v4:2x2", "a slice of v4 has 3 sides, such as v4:2x2x1."),
        ("v3:3x3", "v3 has no such slice; the next is v3:2x4 or v3:4x4."),
        ("v4:2x2x3", "v4 has no such slice; the next is v4:2x2x2 or v4:2x2x4."),
        ("v3:2x512", "v3 has no such slice; the next is v3:32x32."),
        ("v3-4", "v3 has no such slice; the next is v3-8 (v3:2x2); the number counts cores."),
        ("v3-7", "v3 has no such slice; the next is v3-8 (v3:2x2); the number counts cores."),
        ("v3-0", "v3 has no such slice; the next is v3-8 (v3:2x2); the number counts cores."),
        ("v2-1", "v2 has no such slice; the next is v2-8 (v2:2x2); the number counts cores."),
        ("v4-4", "v4 has no such slice; the next is v4-8 (v4:2x2x1); the number counts cores."),
        ("v5p-4", "the next is v5p-8 (v5p:2x2x1); the number counts cores."),
        ("v3-9", "v3 has no such slice; the next is v3-8 (v3:2x2) or v3-16 (v3:2x4);"),
        ("v5e-3", "the next is v5e-1 (v5e:1x1) or v5e-4 (v5e:2x2); the number counts chips."),
        ("v4-300", "the next is v4-256 (v4:4x4x8) or v4-384 (v4:4x4x12); the number counts cores."),
        ("v4:4x4x6", "v4 has no such slice; the next is v4:4x4x4 or v4:4x4x8."),
        ("v5p-12200", "the next is v5p-12160 (v5p:4x20x76) or v5p-12288 (v5p:16x16x24);"),
        ("v4:1x1x1", "v4 has no such slice; the next is v4:2x2x1."),
        ("v3:64x64", "the largest slice of v3 is v3-2048, 1,024 chips."),
        ("v5p-17920", "the largest slice of v5p is v5p-12288, 6,144 chips."),
    ],
)
def test_a_wrong_name_is_answered_in_one_sentence(name, message):
    with pytest.raises(InputError) as error:
        parse_topologies(name)
    text = str(error.value)
    assert message in text and name in text
    assert len(text) < 140 and text.endswith(".") and ". " not in text


@pytest.mark.parametrize("name", ["v3-{}", "{}", "v3:{}x2", "{0}x{0}"])
def test_a_size_of_thousands_of_digits_is_answered_in_one_sentence(name):
    with pytest.raises(InputError, match="is not the name of a TPU slice; give the sides") as error:
        parse_topologies(name.format("9" * 5000))
    assert len(str(error.value)) < 180


def test_a_single_topology():
    assert parse_topology("v3-8", "--topology").name == "v3:2x2"
    for text, message in (
        ("v3-8,v3-32", "--topology=v3-8,v3-32: give one topology."),
        ("tpu7x-8", "--topology=tpu7x-8: TensorFlow does not support TPU7x"),
    ):
        with pytest.raises(InputError, match=message):
            parse_topology(text, "--topology")


def test_the_slices_of_a_chip_grow_by_factors_of_two():
    assert [t.name for t in slices_of(TPU_CHIPS["v6e"])][:3] == ["v6e:1x1", "v6e:2x2", "v6e:2x4"]
    assert [t.name for t in slices_of(TPU_CHIPS["v4"])][:2] == ["v4:2x2x1", "v4:2x2x2"]
    for chip in TPU_CHIPS.values():
        # v5p's largest job is 16x16x24: one and a half times the largest power of two.
        largest = 16**3 if chip.name == "v5p" else chip.max_chips
        assert [t.chips for t in slices_of(chip)][-1] == largest


@pytest.mark.parametrize(
    ("name", "links", "diameter"),
    [
        ("v4:2x2x1", 2, 2),
        ("v4:2x2x4", 3, 5),
        ("v5p:2x4x4", 3, 7),
        ("v4:4x4x4", 6, 6),
        ("v5p:4x4x8", 6, 8),
        ("v6e:8x16", 3, 15),
        ("v3:32x32", 4, 32),
    ],
)
def test_three_dimensions_wrap_around_together(name, links, diameter):
    """Below a cube of 4x4x4, a slice is a mesh; each of two dimensions wraps by itself."""
    (topology,) = parse_topologies(name)
    assert (topology.links_per_chip, topology.diameter) == (links, diameter)


@pytest.mark.parametrize(
    ("name", "replicas"),
    [("v3-8", 8), ("v3-2048", 8), ("v4-64", 4), ("v6e-1", 1), ("v5e-8", 8), ("v5litepod-16", 4)],
)
def test_a_host_of_a_slice_of_several_hosts_has_four_chips(name, replicas):
    (topology,) = parse_topologies(name)
    assert topology.replicas_per_host == replicas


HOSTS = """
import json, sys
from preflight.compiler.compile import open_topology
opened = {}
for name in sys.argv[1:]:
    devices = open_topology(name)
    opened[name] = (len(devices), len({device.process_index for device in devices}))
print(json.dumps(opened))
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "libtpu")),
    reason="JAX and libtpu, the extra `preflight`, are not installed",
)
def test_the_compiler_opens_the_same_slices():
    slices = {t.name: t for chip in TPU_CHIPS.values() for t in slices_of(chip) if t.chips <= 64}
    # Two at once: libtpu by itself lets one process run.
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "0"}
    command = [sys.executable, "-c", HOSTS, *slices]
    with (
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as first,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        ) as second,
    ):
        printed, again = first.communicate()[0], second.communicate()[0]
    assert printed == again
    for name, (devices, hosts) in json.loads(printed).items():
        topology: Topology = slices[name]
        assert devices == topology.replicas, name
        # The compiler has no virtual machine of 8 chips.
        if not (hosts == 2 and topology.chips == topology.chip.max_chips_of_one_host):
            assert devices == hosts * topology.replicas_per_host, name
