"""The strategy of a run, and the checks of its replicas."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from inputs.errors import InputError
from recipes import find_recipe
from training import strategy


def test_forward_and_backward_are_compiled_where_that_is_faster_or_asked_for():
    recipe = find_recipe("bert-mini-demo")
    cpu = tf.distribute.OneDeviceStrategy("/cpu:0")
    gpu = tf.distribute.OneDeviceStrategy("/gpu:0")  # only its name is used; no GPU is needed
    assert [strategy.compiles_step(where, recipe) for where in (cpu, gpu)] == [False, True]
    for asked in (True, False):
        own = dataclasses.replace(recipe, jit_compile=asked)
        assert [strategy.compiles_step(where, own) for where in (cpu, gpu)] == [asked, asked]
    parts = dataclasses.replace(recipe, accumulation=2)
    assert strategy.compiles_step(cpu, parts)
    images = dataclasses.replace(find_recipe("resnet50-one-batch"), jit_compile=None)
    assert images.accumulation > 1
    assert [strategy.compiles_step(where, images) for where in (cpu, gpu)] == [False, True]


def test_without_tf_config_this_machine_is_used(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    where = strategy.connect("")
    assert where.num_replicas_in_sync == 1 and strategy.is_chief(where)
    assert not strategy.is_multi_worker(where)
    strategy.check_workers_agree(where, seed=1)
    with strategy.worker_folder(where, "runs/mine") as folder:
        assert folder == "runs/mine"


def test_a_tpu_with_missing_cores_is_refused():
    places = [[x, y, 0, core] for x in range(2) for y in range(2) for core in range(2)]
    topology = tf.tpu.experimental.Topology
    whole = topology(mesh_shape=[2, 2, 1, 2], device_coordinates=np.array([places]))
    strategy.check_topology(whole, "mine")
    torn = topology(mesh_shape=[2, 2, 1, 2], device_coordinates=np.array([places[:6]]))
    with pytest.raises(InputError, match="--tpu=mine: 2 of the 8 cores of the 2x2x1x2 mesh"):
        strategy.check_topology(torn, "mine")


def test_accumulation_must_divide_a_replicas_batch(mirrored):
    strategy.check_batch(mirrored, 16, 4)
    with pytest.raises(InputError, match="accumulation=8 does not divide a replica's batch of 4"):
        strategy.check_batch(mirrored, 8, 8)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], "float32"),
        (["--tpu=local"], "bfloat16"),
        (["--tpu=local", "--set", "compute_dtype=float32"], "float32"),
    ],
)
def test_a_tpu_computes_in_bfloat16_unless_told_otherwise(flags, dtype, in_process, monkeypatch):
    asked_for = []

    def check(model_dir, recipe, **facts):
        asked_for.append(recipe.compute_dtype)
        raise InputError("far enough")

    monkeypatch.setattr("training.checkpoint.compatibility.check_compatible", check)
    assert in_process(["--synthetic", *flags]) == 1 and asked_for == [dtype]


def test_all_workers_stop_if_one_finds_too_much_damage(monkeypatch):
    def damaged():
        raise InputError("a.tfrecord is damaged")

    where = tf.distribute.get_strategy()
    strategy.check_together(where, lambda: None)
    with pytest.raises(InputError, match="a.tfrecord is damaged"):
        strategy.check_together(where, damaged)
    told = []
    monkeypatch.setattr(strategy, "max_over_workers", lambda _, bad: told.append(bad) or True)
    with pytest.raises(InputError, match="another worker has found more damaged records"):
        strategy.check_together(where, lambda: None)
    with pytest.raises(InputError, match="a.tfrecord is damaged"):
        strategy.check_together(where, damaged)
    assert told == [False, True]
