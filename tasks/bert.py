"""BERT pre-training with masked language modeling and next-sentence prediction."""

import dataclasses
import os

import numpy as np

from export.bert import pretrained_export
from export.model_card import make_card
from export.saved_model import run_client, write_export
from inputs.damage import Reports
from inputs.errors import InputError
from inputs.text import chunks
from inputs.text.packing import bucket_batches
from inputs.text.tokenization import casing, vocabulary
from models import bert, packing
from recipes import RECIPES
from tasks import initial_pretraining, pretraining_data
from tasks.task import Metric, Task, loss_metric

USAGE = """\
import tensorflow_text  # its kernels

fill, encode = (model.signatures[name] for name in ("serving_default", "encode"))
fill(text=tf.constant(["the [MASK] of the array"]))  # tokens, probabilities: [N, masks, 5]
encode(text=tf.constant(["a sentence"]))  # pooled_output: [N, H]; sequence_output: [N, L, H]"""


class BertPretraining(Task):
    """Masked-LM and next-sentence pre-training.

    An example is a sequence, or, with the recipe's `sequences_per_row`, a row of several, or with
    its `length_buckets` a group of several. Held-out examples are always single sequences.

    Args:
        recipe: a `recipes.bert.BertRecipe`.
        data_dir: files, globs or folders of text, comma-separated; or a folder written by
            `inputs.text.prepare`; or TFRecord files of masked examples; or "" for the English text
            of the installed Python packages.
        vocab: path of a vocab.txt, or "" to learn one from the text. Masked examples need theirs.
        resume_dir: see `tasks.task.Task`. A resumed run reads its vocabulary from there.
        seed: int, seed of the data order, sentence pairs and masks.
        synthetic: whether to use random batches instead of text.
        log: takes lines of progress.
        cache_dir: where raw text is prepared, and what a prepared folder lacks is written; "" for
            ~/.cache/tf_lamb.
        shared_dir, reports: see `tasks.task.Task`.
    """

    example_unit = "sequences"
    metrics = (
        loss_metric("masked_loss", "masked"),
        Metric("masked_accuracy", "masked", higher_is_better=True),
        loss_metric("sentence_loss", "sentence"),
        Metric("sentence_accuracy", "sentence", higher_is_better=True),
    )
    best_metric = metrics[1]

    def __init__(
        self,
        recipe,
        *,
        data_dir,
        vocab,
        resume_dir,
        seed,
        synthetic,
        log,
        cache_dir="",
        shared_dir="",
        reports=None,
    ):
        if recipe.model not in bert.SIZES:
            raise InputError(
                f"--set model={recipe.model}: no such size. Sizes: {', '.join(bert.SIZES)}."
            )
        if layout := pretraining_data.joined_layout(recipe, recipe.phases[0]):
            self.example_unit = layout.unit
        self._seed = seed
        self._log = log
        self._slots = self._start = None
        if recipe.init_from and not resume_dir:
            self._start = initial_pretraining.Start(recipe.init_from, recipe.init_slots)
            vocab = vocab or initial_pretraining.vocabulary_beside(recipe.init_from)
        elif not recipe.init_from and _has_published_target(recipe):
            log(
                f"Starting from random weights. The target of {recipe.target:g} was published for "
                "runs from a checkpoint: --set init_from=FOLDER"
            )
        if synthetic:
            self._source = pretraining_data.Synthetic(recipe, vocab, seed)
        else:
            if not vocab and resume_dir:
                vocab = os.path.join(resume_dir, "vocab.txt")
            known = casing.of_checkpoint(resume_dir) if resume_dir else None
            self._source = pretraining_data.open_data(
                recipe,
                data_dir,
                vocab,
                known,
                log=log,
                cache_dir=cache_dir,
                shared_dir=shared_dir,
                reports=reports or Reports.of_one_process(log, shared_dir),
            )
        self.recipe = dataclasses.replace(recipe, lower_case=self._source.lower_case)
        self.vocabulary = self._source.vocabulary
        self.data = self._source.description
        self.amount = self._source.amount
        self.facts = {
            "vocabulary": vocabulary.vocabulary_hash(self.vocabulary),
            "data": self._source.fingerprint,
        }

    def write_files(self, model_dir: str) -> None:
        """Writes vocab.txt."""
        vocabulary.save_vocabulary(self.vocabulary, os.path.join(model_dir, "vocab.txt"))

    def build_model(self):
        """Returns the encoder with the masked-LM and next-sentence heads."""
        model = bert.build_pretrainer(
            bert.SIZES[self.recipe.model],
            len(self.vocabulary),
            self.recipe.max_sequence_length,
            dropout=self.recipe.dropout,
            initializer_stddev=self.recipe.initializer_stddev,
            remat=self.recipe.remat,
        )
        if self._start:
            missing = self._start.assign(model)
            self._slots = self._start.read_slots(model)
            moments = f", its moments after {self._slots.step:,} updates" if self._slots else ""
            random = f"; random in it: {', '.join(missing)}" if missing else ""
            self._log(f"Starting from {self._start.checkpoint}{moments}{random}")
            self._start = None
        return model

    def initial_slots(self, variables):
        """The moments in `init_from`, if they are wanted."""
        slots, self._slots = self._slots, None
        if slots is None:
            return None
        names = [initial_pretraining.own_name(variable) for variable in variables]
        return slots.step, [[moment[name] for name in names] for moment in slots.moments]

    def sums(self, model, batch, training):
        """See `models.bert.pretraining_sums`, and `models.packing` for packed rows."""
        of_batch = packing if "sequence_ids" in batch else bert
        return of_batch.pretraining_sums(model, batch, training)

    def parts(self, batch):
        """See `inputs.text.packing.bucket_batches`, of a batch in buckets."""
        return [batch] if "input_word_ids" in batch else bucket_batches(batch)

    def counts(self, batch):
        """See `models.bert.pretraining_counts`; joined sequences have the same."""
        return bert.pretraining_counts(batch)

    def _training(self, phase_index):
        """The phase, and its training examples."""
        phase = self.recipe.phases[phase_index]
        return phase, self._source.training_examples(phase, self._seed + phase_index)

    def train_batches(self, phase_index, first_step):
        """Training sequences of the phase's length."""
        phase, training = self._training(phase_index)
        return lambda context: training.training_batches(
            phase.global_batch_size, context, first_step
        )

    def evaluation_batches(self, phase_index):
        """The held-out text in sequences of the phase's length."""
        phase = self.recipe.phases[phase_index]
        held_out = self._source.held_out_examples(phase)
        return lambda context: held_out.evaluation_batches(
            phase.global_batch_size, self.recipe.evaluation_examples, context
        )

    def files_read(self, phase_index, context, steps):
        """See `tasks.task.Task.files_read`."""
        del context, steps
        return self._training(phase_index)[1].files

    def order(self, phase_index):
        """See `tasks.task.Task.order`."""
        phase, training = self._training(phase_index)
        return training.order(phase.global_batch_size)

    def damage(self):
        """See `tasks.task.Task.damage`."""
        return self._source.damage()

    def final_metrics(self, model, strategy, output_dir):
        """Returns `frequent_token`, the accuracy of always predicting the most frequent token."""
        del model, strategy, output_dir
        counts = np.zeros(len(self.vocabulary))
        for batch in self.evaluation_batches(len(self.recipe.phases) - 1)(None):
            labels = batch["masked_lm_ids"].numpy()
            weights = batch["masked_lm_weights"].numpy()
            counts += np.bincount(labels.ravel(), weights.ravel(), minlength=len(counts))
        return {"frequent_token": counts.max() / counts.sum()}

    def describe(self, results):
        """Masked-token accuracy compared with the most-frequent-token baseline."""
        accuracy = results["masked_accuracy"]
        baseline = results["frequent_token"]
        line = (
            f"masked-token accuracy {accuracy:.3f}, {accuracy / baseline:.1f} times the "
            f"{baseline:.3f} of always guessing the most frequent token"
        )
        if self.recipe.packing == chunks.FULL:  # there are no sentence pairs
            return line
        return f"{line}; next-sentence accuracy {results['sentence_accuracy']:.3f}"

    def export(self, model, export_dir, results, steps=None):
        """Writes a SavedModel that predicts masked tokens and encodes sentences."""
        card = make_card(self, model.count_params(), results, USAGE, steps)
        export = pretrained_export(
            model,
            self.vocabulary,
            self.recipe.max_sequence_length,
            lower_case=self.recipe.lower_case,
        )
        write_export(export, card, export_dir)

    def demonstrate(self, export_dir):
        """Prints the SavedModel's predictions for masked words in held-out sentences."""
        print(
            "Masks filled by the SavedModel, in a separate process:",
            flush=True,
        )
        sentences, words = zip(*self._source.masked_sentences(), strict=True)
        run_client(export_dir, *sentences)
        print(f"The words behind the masks: {', '.join(words)}")


def _has_published_target(recipe) -> bool:
    """Whether the target is the recipe's own, and not one that the user has set."""
    shipped = RECIPES.get(recipe.name)
    return shipped is not None and recipe.target is not None and recipe.target == shipped.target
