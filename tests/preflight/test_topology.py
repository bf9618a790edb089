"""Topologies: names, sizes and error messages."""

import pytest

from inputs.errors import InputError
from preflight.topology import parse_topologies


@pytest.mark.parametrize(
    ("name", "full_name", "chips", "replicas"),
    [
        ("v3-2048", "v3:32x32", 1024, 2048),
        ("v3-32", "v3:4x4", 16, 32),
        ("v2-512", "v2:16x16", 256, 512),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v5e-16", "v5e:4x4", 16, 16),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v6e:8x16", "v6e:8x16", 128, 128),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144),
        ("v4:4x4x12", "v4:4x4x12", 192, 192),
        ("v3:8x4", "v3:8x4", 32, 64),
    ],
)
def test_a_slice_is_named_by_its_sides_or_its_size(name, full_name, chips, replicas):
    (topology,) = parse_topologies(name)
    assert (topology.name, topology.chips, topology.replicas) == (full_name, chips, replicas)


def test_a_list_has_no_duplicates():
    names = [topology.name for topology in parse_topologies("v3-32, v3:4x4,v4-8")]
    assert names == ["v3:4x4", "v4:2x2x1"]


@pytest.mark.parametrize(
    "name",
    ["v9:2x2", "v3", "v3:3x3", "v3-7", "v3:64x64", "v4:2x2", "v3:2x512", "v4:2x2x3", "v3-0", ""],
)
def test_an_unknown_topology_lists_the_known_ones(name):
    known = "Known topologies: v2:2x2 to v2-512, v3:2x2 to v3-2048, v4:2x2x1 to v4-8192, v5e"
    with pytest.raises(InputError, match=known):
        parse_topologies(name)
