"""One training step of one replica: forward and backward as one XLA program, then the update."""

import tensorflow as tf

from training.dropout import StepSeed, replica_seed
from training.monitor.noise_scale import PARTS, noise_sums, squared_norm


class ReplicaStep:
    """What each replica does with its share of a global batch, in replica context.

    Gradients are summed over `accumulation` micro-batches on the device, then once over the
    replicas. Batch norm sees a micro-batch at a time, and its moving averages move with each.

    Args:
        model: a tf_keras model, made under the strategy's scope.
        optimizer: a tf_keras optimizer, likewise.
        sums: `(model, batch, training) -> dict` of summed losses and hits, float32 scalars.
        counts: `(batch) -> dict` of what the sums are divided by, float32 scalars. A sum's name
            begins with its count's: "masked_loss" is divided by "masked".
        seed: int in [0, 2**32), of dropout.
        accumulation: micro-batches of one step; divides the replica's batch.
        jit_compile: whether forward and backward become one XLA program here. Not on a TPU,
            where the whole replica's is one already.
        measure_noise: whether a training step's sums and counts also tell its gradient noise.
    """

    def __init__(
        self, model, optimizer, sums, counts, *, seed, accumulation, jit_compile,
        measure_noise=False,
    ):  # fmt: skip
        self.model, self.optimizer, self._measure_noise = model, optimizer, measure_noise
        self._sums, self._counts = sums, counts
        self._seed, self._accumulation = seed, accumulation
        self._step_seed = StepSeed(model)
        self.batch_spec = None  # of a replica's batch, once the step is traced
        if accumulation > 1 and not jit_compile:
            # TensorFlow's graph optimizer may put sums into temporary variables. In a loop within
            # a loop, as here, the second step then ended with AlreadyExistsError for one of them
            # (seen: BERT-tiny, 4 x 64 sequences of 128; without the optimizer it went on).
            tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        compiled = tf.function(jit_compile=True) if jit_compile else lambda f: f
        self._gradients = compiled(self.sums_and_gradients)
        self._evaluation = compiled(
            lambda batch: (self._sums(model, batch, training=False), self._counts(batch))
        )

    def train(self, batch, number):
        """Updates the model in step `number`, an integer scalar; this replica's (sums, counts)."""
        self.batch_spec = tf.nest.map_structure(tf.TensorSpec.from_tensor, batch)
        counts = self._counts(batch)
        # The loss is the mean over the global batch, so its divisor is summed over the replicas.
        context = tf.distribute.get_replica_context()
        total_counts = {key: context.all_reduce("SUM", value) for key, value in counts.items()}
        seed = replica_seed(self._seed, number, context.replica_id_in_sync_group)
        sums, gradients = self._gradients(batch, total_counts, seed)
        if self._measure_noise:
            gradients = context.all_reduce("SUM", gradients)
            replicas = context.num_replicas_in_sync
            own_batch = next(iter(batch.values())).shape[0]
            noise = noise_sums(sums.pop(PARTS), gradients, own_batch, replicas, self._accumulation)
            sums, counts = sums | noise[0], counts | noise[1]
        self.optimizer.apply_gradients(
            zip(gradients, self.model.trainable_variables, strict=True),
            skip_gradients_aggregation=self._measure_noise,
        )
        return sums, counts

    def evaluation(self, batch):
        """(sums, counts) of a batch without dropout."""
        # Not handed to `strategy.run` itself: that would trace it once, for the first replica.
        return self._evaluation(batch)

    def sums_and_gradients(self, batch, total_counts, seed):
        """(sums, gradients) of a replica's batch: a function of its arguments and the weights.

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

        def add(number, totals):
            part = {name: tf.gather(value, number) for name, value in parts.items()}
            own_seed = tf.random.experimental.stateless_fold_in(seed, number)
            results = self._micro_batch(part, total_counts, own_seed)
            return number + 1, tf.nest.map_structure(tf.add, totals, results)

        zeros = (
            dict.fromkeys(self._sum_names(batch), tf.constant(0.0)),
            [
                tf.zeros(variable.shape, variable.dtype)
                for variable in self.model.trainable_variables
            ],
        )
        return tf.while_loop(
            lambda number, _: number < self._accumulation, add, (tf.constant(0), zeros)
        )[1]

    def _sum_names(self, batch):
        """What the loop has to add up, known before the loop: the forward pass is traced apart."""
        traced = tf.function(lambda batch: self._sums(self.model, batch, training=False))
        specs = tf.nest.map_structure(tf.TensorSpec.from_tensor, batch)
        names = list(traced.get_concrete_function(specs).structured_outputs)
        return [*names, PARTS] if self._measure_noise else names

    def _micro_batch(self, batch, total_counts, seed):
        with self._step_seed.set_to(seed), tf.GradientTape() as tape:
            sums = self._sums(self.model, batch, training=True)
            loss = tf.add_n(
                [
                    value / total_counts[name.split("_")[0]]
                    for name, value in sums.items()
                    if name.endswith("_loss")
                ]
            )
        gradients = tape.gradient(loss, self.model.trainable_variables)
        gradients = [tf.convert_to_tensor(g) for g in gradients]
        return sums | ({PARTS: squared_norm(gradients)} if self._measure_noise else {}), gradients
