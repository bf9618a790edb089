"""One training step of one replica: forward and backward pass, then the update."""

import tensorflow as tf

from tasks.task import loss_terms, means
from training.dropout import StepSeed, replica_seed
from training.monitor.noise_scale import PARTS, noise_sums, squared_norm
from training.optimizers import KERAS_OPTIMIZERS, decayed

# Of the sums of a training step: the number of replicas whose gradient was not finite.
NONFINITE = "nonfinite"


def step_settings(recipe) -> dict:
    """Returns the arguments of `ReplicaStep` that a recipe decides, except `accumulation`."""
    return {
        "measure_noise": recipe.measure_noise_scale,
        "sum_dtype": recipe.sum_dtype,
        "clipnorm": recipe.global_clipnorm if recipe.clip_each_replica else None,
        "l2": recipe.l2_regularization,
        "l2_exclusions": recipe.exclude_from_weight_decay,
        "count_nonfinite": recipe.optimizer in KERAS_OPTIMIZERS or not recipe.skip_nonfinite,
    }


class ReplicaStep:
    """The training and evaluation step of a replica. Call its methods in replica context.

    Gradients are summed over `accumulation` micro-batches on the device, then once over the
    replicas. Batch normalization uses the statistics of one micro-batch at a time and updates its
    moving averages with each.

    Args:
        task: a `tasks.task.Task`, of which `metrics`, `parts`, `sums` and `counts` are used.
        model: a tf_keras model, created in the strategy's scope.
        optimizer: a tf_keras optimizer, created in the strategy's scope.
        seed: int in [0, 2**32), for dropout.
        accumulation: number of micro-batches in a step, a divisor of the replica's batch size.
        jit_compile: whether to compile forward and backward pass as one XLA program. False on a
            TPU, where `strategy.run` already compiles the whole replica function.
        measure_noise: whether the sums and counts of a training step include those of the
            gradient noise scale.
        sum_dtype: name of the dtype in which gradients are summed over the replicas.
        clipnorm: None, or the largest norm of each replica's gradient of the mean loss over its own
            examples. Larger gradients are scaled to that norm before they are summed.
        l2: the coefficient of the L2 term ½‖x‖² of the loss. Its gradient is added after `clipnorm`
            and the noise scale; `sums` do not include the term.
        l2_exclusions: patterns of the variables that are not in the L2 term.
        count_nonfinite: whether the sums of a training step include `NONFINITE`, for an optimizer
            that does not skip an update whose gradient is not finite.
    """

    def __init__(
        self,
        task,
        model,
        optimizer,
        *,
        seed,
        accumulation=1,
        jit_compile,
        measure_noise=False,
        sum_dtype="float32",
        clipnorm=None,
        l2=0.0,
        l2_exclusions=(),
        count_nonfinite=False,
    ):
        self.model = model
        self.optimizer = optimizer
        self.batch_spec = None  # of a replica's batch; set when the step is traced
        self._task = task
        self._seed = seed
        self._accumulation = accumulation
        self._measure_noise = measure_noise
        self._sum_dtype = tf.as_dtype(sum_dtype)
        self._clipnorm = clipnorm
        self._count_nonfinite = count_nonfinite
        self._l2 = l2
        self._in_l2 = decayed(l2_exclusions, model.trainable_variables) if l2 else ()
        self._step_seed = StepSeed(model)
        if accumulation > 1 and not jit_compile:
            # TensorFlow's graph optimizer may put sums into temporary variables. In nested loops,
            # as here, the second step then fails with AlreadyExistsError for one of them (seen
            # with BERT-tiny, 4 x 64 sequences of 128; not with the graph optimizer disabled).
            tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        compiled = (
            tf.function(jit_compile=True, autograph=False)
            if jit_compile
            else lambda function: function
        )
        self._gradients = compiled(self.sums_and_gradients)
        self._evaluation = compiled(
            lambda batch: (task.sums(model, batch, training=False), task.counts(batch))
        )

    def train(self, batch, step):
        """Computes gradients and updates the model.

        Args:
            batch: dictionary of [B, ...] tensors of static shape.
            step: integer scalar, steps done so far; part of the seed of dropout.

        Returns:
            (sums, counts) of this replica's batch: dictionaries of float32 scalars.
        """
        self.batch_spec = tf.nest.map_structure(tf.TensorSpec.from_tensor, batch)
        counts = self._task.counts(batch)
        # The loss is the mean over the global batch, so its divisor is summed over the replicas.
        context = tf.distribute.get_replica_context()
        total_counts = {key: context.all_reduce("SUM", value) for key, value in counts.items()}
        seed = replica_seed(self._seed, step, context.replica_id_in_sync_group)
        sums, gradients = self._gradients(batch, total_counts, seed)
        if self._clipnorm is not None:
            gradients = self._clip(gradients, context.num_replicas_in_sync)
        own_sum = self._measure_noise or self._sum_dtype != tf.float32
        if own_sum:
            gradients = self._sum_over_replicas(gradients, context)
        if self._measure_noise:
            replica_batch = next(iter(batch.values())).shape[0]
            noise = noise_sums(
                sums.pop(PARTS),
                gradients,
                replica_batch,
                context.num_replicas_in_sync,
                self._accumulation,
            )
            sums, counts = sums | noise[0], counts | noise[1]
        if self._count_nonfinite:
            bad = ~tf.math.is_finite(squared_norm(gradients))
            sums = sums | {NONFINITE: tf.cast(bad, tf.float32)}
        if self._l2:
            gradients = self._add_l2(gradients, 1 if own_sum else context.num_replicas_in_sync)
        self.optimizer.apply_gradients(
            zip(gradients, self.model.trainable_variables, strict=True),
            skip_gradients_aggregation=own_sum,
        )
        return sums, counts

    def _add_l2(self, gradients, summands):
        """Adds the L2 term's gradient / `summands`: that many gradients are summed afterward."""
        variables = self.model.trainable_variables
        return [
            gradient + tf.cast(self._l2 / summands * x, gradient.dtype) if added else gradient
            for gradient, x, added in zip(gradients, variables, self._in_l2, strict=True)
        ]

    def _clip(self, gradients, replicas):
        """Clips a replica's gradients, of the mean over the global batch, to `clipnorm`.

        The gradient of the mean over the replica's own examples is `replicas` times as large. (This
        assumes that the divisors of the loss, numbers of masked tokens, are equal on all replicas.)
        """
        norm = tf.sqrt(squared_norm(gradients)) * replicas
        factor = self._clipnorm / tf.maximum(norm, self._clipnorm)
        return [gradient * tf.cast(factor, gradient.dtype) for gradient in gradients]

    def _sum_over_replicas(self, gradients, context):
        """Sums the gradients over the replicas, in `sum_dtype`."""
        if context.num_replicas_in_sync == 1:
            return gradients
        dtypes = [gradient.dtype for gradient in gradients]
        sums = context.all_reduce("SUM", [tf.cast(g, self._sum_dtype) for g in gradients])
        return [tf.cast(g, dtype) for g, dtype in zip(sums, dtypes, strict=True)]

    def evaluation(self, batch):
        """Returns (sums, counts) of a batch, in evaluation mode."""
        # `strategy.run` would trace a `tf.function` only once, for the first replica. It calls a
        # plain method once for each replica.
        return self._evaluation(batch)

    def sums_and_gradients(self, batch, total_counts, seed):
        """Returns (sums, gradients) of a replica's batch.

        Args:
            batch: dictionary of [B, ...] tensors of static shape.
            total_counts: dictionary of float32 scalars, the counts of the global batch.
            seed: [2] int32, from `replica_seed`.
        """
        if self._accumulation == 1:
            return self._micro_batch(batch, total_counts, seed)
        parts = {
            name: tf.reshape(
                value, [self._accumulation, value.shape[0] // self._accumulation, *value.shape[1:]]
            )
            for name, value in batch.items()
        }

        def add(index, totals):
            part = {name: tf.gather(value, index) for name, value in parts.items()}
            part_seed = tf.random.experimental.stateless_fold_in(seed, index)
            results = self._micro_batch(part, total_counts, part_seed)
            return index + 1, tf.nest.map_structure(tf.add, totals, results)

        names = [metric.name for metric in self._task.metrics]
        if self._measure_noise:
            names.append(PARTS)
        zeros = (
            dict.fromkeys(names, tf.constant(0.0)),
            [
                tf.zeros(variable.shape, variable.dtype)
                for variable in self.model.trainable_variables
            ],
        )
        return tf.while_loop(
            lambda index, _: index < self._accumulation, add, (tf.constant(0), zeros)
        )[1]

    def _micro_batch(self, batch, total_counts, seed):
        results = [
            # Layers draw other masks in each part.
            self._part(
                part,
                total_counts,
                tf.random.experimental.stateless_fold_in(seed, index) if index else seed,
            )
            for index, part in enumerate(self._task.parts(batch))
        ]
        sums, gradients = tf.nest.map_structure(lambda *terms: tf.add_n(terms), *results)
        if self._measure_noise:
            sums = sums | {PARTS: squared_norm(gradients)}
        return sums, gradients

    def _part(self, batch, total_counts, seed):
        # The backward pass needs the seed, too: rematerialized layers draw their masks again.
        with self._step_seed.set_to(seed):
            with tf.GradientTape() as tape:
                sums = self._task.sums(self.model, batch, training=True)
                values = means(self._task.metrics, sums, total_counts)
                loss = tf.add_n(loss_terms(self._task.metrics, values))
            gradients = tape.gradient(loss, self.model.trainable_variables)
        return sums, [tf.convert_to_tensor(g) for g in gradients]
