"""Traces and lowers the training step of a replica as on a TPU, without running it.

Stock TensorFlow lowers for a CPU only. Three parts would give a different program than on a TPU and
are replaced: the strategy and the all-reduce by `PodStrategy`, the random bits by
`_tpu_random_bits`.
"""

import contextlib
import dataclasses
from unittest import mock

import tensorflow as tf
import tf_keras
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.distribute.one_device_strategy import OneDeviceExtended
from tensorflow.python.ops import gen_stateless_random_ops_v2 as random_ops

from tasks import TASKS
from training import optimizers
from training.checkpoint.manager import RunState
from training.step import ReplicaStep, step_settings

DEFAULT_ALGORITHM = tf.random.Algorithm.AUTO_SELECT.value


class _PodExtended(OneDeviceExtended):
    """The implementation of `PodStrategy`: one CPU that acts as one of several replicas."""

    def __init__(self, strategy, replicas):
        super().__init__(strategy, "/cpu:0")
        self._replicas = replicas

    @property
    def _num_replicas_in_sync(self):
        return self._replicas

    def _create_variable(self, next_creator, **kwargs):
        value = kwargs["initial_value"]
        if callable(value):
            with tf.Graph().as_default():
                value = value()
        if tf.is_tensor(value) and value.shape.num_elements() > 1:
            # Leave it uninitialized: no memory is allocated for pages that are never written.
            value = tf.raw_ops.Empty(shape=value.shape, dtype=value.dtype)
            kwargs["initial_value"] = value
        return super()._create_variable(next_creator, **kwargs)

    def _reduce_to(self, reduce_op, value, destinations, options):
        return tf.nest.map_structure(self._all_reduce, value)

    def _batch_reduce_to(self, reduce_op, value_destination_pairs, options):
        return [
            tf.nest.map_structure(self._all_reduce, value) for value, _ in value_destination_pairs
        ]

    def _all_reduce(self, value):
        if self._replicas == 1:
            return value
        all_replicas = [list(range(self._replicas))]
        return gen_xla_ops.xla_all_reduce(
            value, group_assignment=all_replicas, reduce_op="Add", mode="CrossReplica"
        )


class PodStrategy(tf.distribute.TPUStrategy):
    """A `TPUStrategy` without a TPU, for tracing one replica; reductions are XLA all-reduces.

    It subclasses `TPUStrategy` so that code that checks the type traces the same branches.
    Variables are not initialized.

    Args:
        replicas: number of replicas that share a global batch.
    """

    def __init__(self, replicas: int):
        # Does not call `TPUStrategy.__init__`, which would connect to a TPU.
        tf.distribute.Strategy.__init__(self, _PodExtended(self, replicas))


@contextlib.contextmanager
def _tpu_random_bits():
    """Returns a context in which random numbers are generated as on a TPU.

    For a CPU, tf2xla expands Philox into integer arithmetic, which would be a third of a step. For
    a TPU, it uses `RngBitGenerator` with the default algorithm, whose state is one word of the key
    and one of the counter (tensorflow/compiler/tf2xla/kernels/stateless_random_ops_v2.cc, and
    `GetCounterSize` and `BitGenerator` in random_ops_util.cc). The key is the unmodified seed, and
    the counter starts at 0. Floats have 23 random bits. This is what the kernels of tensorflow-tpu
    2.20.0 lower to (`--preflight_strict` has them), for every generation of TPU.
    """

    def key_and_counter(seed, name=None):
        """Returns the key, [1] uint64, and the counter, [2] uint64, of a seed of two integers."""
        low, high = tf.unstack(tf.cast(tf.cast(seed, tf.uint32), tf.uint64))
        shift = tf.constant(32, tf.uint64)
        key = tf.bitwise.bitwise_or(low, tf.bitwise.left_shift(high, shift))
        return tf.reshape(key, [1]), tf.zeros([2], tf.uint64)

    def integers(shape, key, counter, alg, dtype=tf.uint32, name=None):
        state = tf.concat([key, counter[:1]], axis=0)
        unsigned = tf.uint64 if dtype.size == 8 else tf.uint32
        bits = gen_xla_ops.xla_rng_bit_generator(
            DEFAULT_ALGORITHM, state, shape, dtype=unsigned
        ).output
        return tf.bitcast(bits, dtype)

    def floats(shape, key, counter, alg, dtype=tf.float32, name=None):
        bits = tf.bitwise.right_shift(integers(shape, key, counter, alg), 9)
        return tf.cast(tf.cast(bits, tf.float32) * 2.0**-23, dtype)

    with mock.patch.multiple(
        random_ops,
        stateless_random_get_key_counter=key_and_counter,
        stateless_random_uniform_v2=floats,
        stateless_random_uniform_full_int_v2=integers,
    ):
        yield


class Replica:
    """Model, optimizer and training step of a recipe on one replica.

    Args:
        recipe: a checked `recipes.types.Recipe`.
        phase_index: the phase, from 0.
        replicas: number of replicas that share a global batch.
        optimizer: function `(recipe, schedule) -> optimizer`. By default, the optimizer is the one
            of the recipe.
    """

    def __init__(
        self, recipe, phase_index: int, replicas: int, optimizer=optimizers.make_optimizer
    ):
        self.recipe = recipe
        self.phase_index = phase_index
        if recipe.compute_dtype != "float32":
            tf_keras.mixed_precision.set_global_policy(f"mixed_{recipe.compute_dtype}")
        self.strategy = PodStrategy(replicas)
        with self.strategy.scope():
            self._state = RunState()
            schedule = optimizers.RunSchedule(optimizers.make_schedule(recipe), self._state)
            self.optimizer = optimizer(recipe, schedule)
            self.model = self._make_task(1).build_model()
            optimizers.build(self.optimizer, recipe, self.model.trainable_variables)

    def _make_task(self, replica_batch_size):
        """Returns the recipe's task with synthetic data and this batch size in all phases."""
        phases = tuple(
            dataclasses.replace(phase, global_batch_size=replica_batch_size)
            for phase in self.recipe.phases
        )
        return TASKS[self.recipe.task](
            dataclasses.replace(self.recipe, phases=phases),
            data_dir="",
            vocab="",
            resume_dir=None,
            seed=0,
            synthetic=True,
            log=lambda line: None,
        )

    def step_program(self, replica_batch_size: int, accumulation: int) -> bytes:
        """Lowers a whole step.

        Args:
            replica_batch_size: examples per replica and step.
            accumulation: number of micro-batches, which divides `replica_batch_size`.

        Returns:
            The serialized HLO.
        """
        step, spec = self._make_step(replica_batch_size, accumulation)
        return self._lower(lambda **batch: step.train(batch, self._state.step), **spec)

    def traced_step(self, replica_batch_size: int) -> tf.types.experimental.ConcreteFunction:
        """Traces a whole step with the recipe's accumulation, without lowering it."""
        step, spec = self._make_step(replica_batch_size, self.recipe.accumulation)
        function = self._make_function(lambda **batch: step.train(batch, self._state.step))
        return function.get_concrete_function(**spec)

    def traced_gradients(self, replica_batch_size: int) -> tf.types.experimental.ConcreteFunction:
        """Traces forward and backward of one micro-batch, without lowering them."""
        step, spec = self._make_step(replica_batch_size, 1)
        task = self._make_task(replica_batch_size)
        function = tf.function(
            lambda batch, seed: step.sums_and_gradients(batch, task.counts(batch), seed),
            autograph=False,
        )
        return function.get_concrete_function(spec, tf.TensorSpec([2], tf.int32))

    def _make_step(self, replica_batch_size, accumulation):
        """Returns a `ReplicaStep`, and the element spec of its batches."""
        task = self._make_task(replica_batch_size)
        step = ReplicaStep(
            task,
            self.model,
            self.optimizer,
            seed=0,
            accumulation=accumulation,
            jit_compile=False,
            **step_settings(self.recipe),
        )
        return step, task.train_batches(self.phase_index, 0)(None).element_spec

    def update_program(self) -> bytes:
        """Lowers the update alone, with the gradients as arguments.

        Returns:
            The serialized HLO.
        """
        variables = self.model.trainable_variables

        def update(*gradients):
            self.optimizer.apply_gradients(
                zip(gradients, variables, strict=True), skip_gradients_aggregation=True
            )

        return self._lower(update, *(tf.TensorSpec(v.shape, v.dtype) for v in variables))

    def _lower(self, function, *specs, **named_specs):
        """Lowers a function that runs in replica context. Returns the serialized HLO."""
        with _tpu_random_bits():
            compiled = self._make_function(function)
            lower = compiled.experimental_get_compiler_ir(*specs, **named_specs)
            return lower(stage="hlo_serialized")

    def _make_function(self, function):
        """Returns a `tf.function` for XLA that runs a function in replica context."""
        run = self.strategy.extended.call_for_each_replica
        return tf.function(
            lambda *args, **kwargs: run(function, args, kwargs), jit_compile=True, autograph=False
        )

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(v.shape.num_elements() for v in self.model.trainable_variables)

    @property
    def weight_bytes(self) -> int:
        """The bytes of all variables of the model."""
        return _bytes(self.model.variables)

    @property
    def slot_bytes(self) -> int:
        """The bytes of all variables of the optimizer."""
        return _bytes(self.optimizer.variables)


def _bytes(variables):
    return sum(v.shape.num_elements() * v.dtype.size for v in variables)


@tf.autograph.experimental.do_not_convert  # see `train.main`
def lower(recipe, phase_index: int, programs: list[tuple]) -> dict:
    """Lowers programs into files, for two replicas.

    `preflight.compiler.compile` sets the replicas of the all-reduces.

    Args:
        recipe: a checked recipe.
        phase_index: from 0.
        programs: list of tuples (examples per replica, or None for the update alone; number of
            micro-batches; path for the HLO).

    Returns:
        `parameters`, `weight_bytes` and `slot_bytes`, see `Replica`.
    """
    replica = Replica(recipe, phase_index, replicas=2)
    for batch, accumulation, path in programs:
        if batch is None:
            program = replica.update_program()
        else:
            program = replica.step_program(batch, accumulation)
        with open(path, "wb") as file:
            file.write(program)
    return {name: getattr(replica, name) for name in ("parameters", "weight_bytes", "slot_bytes")}
