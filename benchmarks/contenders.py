"""What benchmarks/engine.py compares with the engine: the bare step, and Keras's `model.fit`."""

import dataclasses

import tensorflow as tf
import tf_keras

import recipes
from tasks import TASKS
from tf_lamb import tf_keras as optimizers
from training import strategy
from training.checkpoint.manager import RunState
from training.step import ReplicaStep


@dataclasses.dataclass
class Parts:
    """The parts of a training program."""

    recipe: object
    where: tf.distribute.Strategy
    task: object
    model: tf_keras.Model
    state: RunState

    def batches(self):
        """The synthetic batches, distributed."""
        return self.where.distribute_datasets_from_function(self.task.train_batches(0, 0))

    def replica_step(self, optimizer):
        """The engine's training step with an optimizer."""
        return ReplicaStep(
            self.task,
            self.model,
            optimizer,
            seed=1,
            jit_compile=strategy.compiles_step(self.where, self.recipe),
        )


def make_recipe(global_batch_size: int, save_every_steps: int):
    """The demo's BERT-tiny, with more steps than are timed."""
    recipe = recipes.resized(
        recipes.find_recipe("bert-mini-demo"),
        steps=1_000_000,
        global_batch_size=global_batch_size,
    )
    return dataclasses.replace(recipe, save_every_steps=save_every_steps, telemetry=True)


def make_task(recipe):
    """The recipe's task on synthetic batches."""
    return TASKS["bert"](
        recipe,
        data_dir="",
        vocab="",
        resume_dir=None,
        seed=1,
        synthetic=True,
        log=lambda line: None,
    )


def make_parts(recipe, where) -> Parts:
    """A task and a model; the same for all, weights too."""
    tf_keras.utils.set_random_seed(1)
    task = make_task(recipe)
    with where.scope():
        return Parts(recipe, where, task, task.build_model(), RunState())


def plain_optimizer(parts):
    """The recipe's LAMB without the engine's additions."""
    recipe = parts.recipe
    with parts.where.scope():
        optimizer = optimizers.LAMB(
            optimizers.Phases([phase.schedule() for phase in recipe.phases]),
            weight_decay=recipe.weight_decay,
            exclude_from_weight_decay=recipe.exclude_from_weight_decay,
        )
        optimizer.build(parts.model.trainable_variables)
    return optimizer


def bare_block(parts, steps):
    """A function that runs a block of steps without the engine."""
    replica_step = parts.replica_step(plain_optimizer(parts))
    batch = next(iter(parts.batches()))
    step = tf.function(lambda: parts.where.run(replica_step.train, args=(batch, parts.state.step)))

    def block():
        for _ in range(steps):
            sums, _ = step()
        return [float(value) for value in sums.values()]

    return block


def fit_block(parts, steps, **compiled):
    """A function that runs a block of steps with `model.fit`."""
    weights = {"mlm_logits": "masked_lm_weights", "next_sentence": "example_weights"}
    labels = {"mlm_logits": "masked_lm_ids", "next_sentence": "next_sentence_labels"}

    def for_fit(batch):
        inputs = {name: batch[name] for name in parts.model.input}
        picked = ({key: batch[name] for key, name in names.items()} for names in (labels, weights))
        return inputs, *picked

    optimizer = plain_optimizer(parts)
    with parts.where.scope():
        loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        parts.model.compile(optimizer, {"mlm_logits": loss, "next_sentence": loss}, **compiled)
    data = parts.task.train_batches(0, 0)(None).map(for_fit)
    return lambda: parts.model.fit(data, steps_per_epoch=steps, epochs=1, verbose=0)
