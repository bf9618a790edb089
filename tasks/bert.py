"""BERT pre-training with masked language modelling and next-sentence prediction."""

import dataclasses
import itertools
import os

import numpy as np

from export.bert import pretrained_export
from export.model_card import make_card
from export.saved_model import run_client, write_export
from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.shards import MANIFEST, is_prepared
from inputs.text import casing, chunks, corpus, examples, vocabulary
from inputs.text.batches import element_spec
from inputs.text.packing import packed_spec
from inputs.text.prepare import prepare_in_cache
from inputs.text.shards import load_manifest
from models import bert, packing
from tasks import initial_pretraining
from tasks import synthetic as made_up
from tasks.task import Metric, Task, loss_metric

SHOWN_SENTENCES = 4
SEARCHED_SENTENCES = 20_000
EVALUATION_SEED = 0  # so that held-out text is masked in the same way in every run
DAMAGE = "damaged-records"  # folder of the reports of hosts, in `shared_dir`
USAGE = """\
import tensorflow_text  # its kernels

fill, encode = (model.signatures[name] for name in ("serving_default", "encode"))
fill(text=tf.constant(["the [MASK] of the array"]))  # tokens, probabilities: [N, masks, 5]
encode(text=tf.constant(["a sentence"]))  # pooled_output: [N, H]; sequence_output: [N, L, H]"""


class BertPretraining(Task):
    """Masked-LM and next-sentence pre-training.

    An example is a sequence, or, with the recipe's `sequences_per_row`, a row of several. Held-out
    examples are always single sequences.

    Args:
        recipe: a `recipes.bert.BertRecipe`.
        data_dir: files, globs or folders of text, comma-separated; or a folder written by
            `inputs.text.prepare`; or "" for the English text of the installed Python packages.
        vocab: path of a vocab.txt, or "" to learn one from the text.
        resume_dir: see `tasks.task.Task`. A resumed run reads its vocabulary from there.
        seed: int, seed of the data order, sentence pairs and masks.
        synthetic: whether to use random batches instead of text.
        log: takes lines of progress.
        cache_dir: where raw text is prepared, and what a prepared folder lacks is written; "" for
            ~/.cache/tf_lamb.
        shared_dir: see `tasks.task.Task`.
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
    ):
        if recipe.model not in bert.SIZES:
            raise InputError(
                f"--set model={recipe.model}: no such size. Sizes: {', '.join(bert.SIZES)}."
            )
        if recipe.sequences_per_row > 1:
            self.example_unit = "rows"
        self._seed = seed
        self._log = log
        self._slots = self._start = None
        if recipe.init_from and not resume_dir:
            self._start = initial_pretraining.Start(recipe.init_from, recipe.init_slots)
            vocab = vocab or initial_pretraining.vocabulary_beside(recipe.init_from)
        elif recipe.target is not None and not recipe.init_from:
            log(
                f"Starting from random weights. The target of {recipe.target:g} was published for "
                "runs from a checkpoint: --set init_from=FOLDER"
            )
        if synthetic:
            self._source = _SyntheticText(recipe, vocab, seed)
        else:
            if not vocab and resume_dir:
                vocab = os.path.join(resume_dir, "vocab.txt")
            known = casing.of_checkpoint(resume_dir) if resume_dir else None
            self._source = _Text(recipe, data_dir, vocab, known, log, cache_dir, shared_dir)
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

    def counts(self, batch):
        """See `models.bert.pretraining_counts`; packed rows have the same."""
        return bert.pretraining_counts(batch)

    def train_batches(self, phase_index, first_step):
        """Training sequences of the phase's length."""
        phase = self.recipe.phases[phase_index]
        training = self._source.training_examples(phase, self._seed + phase_index)
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
        phase = self.recipe.phases[phase_index]
        return self._source.training_examples(phase, self._seed + phase_index).files

    def check_data(self):
        """See `tasks.task.Task.check_data`."""
        self._source.check()

    def final_metrics(self, model, strategy, output_dir):
        """Returns `frequent_token`, the accuracy of always predicting the most frequent token."""
        del model, strategy, output_dir
        counts = np.zeros(len(self.vocabulary))
        for batch in self.evaluation_batches(len(self.recipe.phases) - 1)(None):
            labels, weights = batch["masked_lm_ids"].numpy(), batch["masked_lm_weights"].numpy()
            counts += np.bincount(labels.ravel(), weights.ravel(), minlength=len(counts))
        return {"frequent_token": counts.max() / counts.sum()}

    def describe(self, results):
        """Masked-token accuracy compared with the most-frequent-token baseline."""
        accuracy, baseline = results["masked_accuracy"], results["frequent_token"]
        line = (
            f"masked-token accuracy {accuracy:.3f}, {accuracy / baseline:.1f} times the "
            f"{baseline:.3f} of always guessing the most frequent token"
        )
        if self.recipe.packing == chunks.FULL:  # there are no sentence pairs
            return line
        return f"{line}; next-sentence accuracy {results['sentence_accuracy']:.3f}"

    def export(self, model, export_dir, results):
        """Writes a SavedModel that predicts masked tokens and encodes sentences."""
        card = make_card(self, model.count_params(), results, USAGE)
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
            "Filled in, by the SavedModel in a process of its own, in held-out sentences:",
            flush=True,
        )
        sentences, words = zip(*self._source.masked_sentences(), strict=True)
        run_client(export_dir, *sentences)
        print(f"The words behind the masks: {', '.join(words)}")


class _Text:
    """Training and held-out documents as word pieces."""

    def __init__(self, recipe, data_dir, vocab, known_case, log, cache_dir, shared_dir):
        self._recipe = recipe
        self._damage_dir = shared_dir and os.path.join(shared_dir, DAMAGE)
        records = BadRecords(
            recipe.max_bad_record_share, skip=recipe.on_bad_record == "skip", log=log
        )
        self._log = log
        self._made: dict = {}
        self.description = data_dir or "Python's help topics and installed packages' docstrings"
        log(f"Reading {self.description}")
        if not (data_dir and is_prepared(data_dir)):
            if shared_dir:
                raise InputError(
                    f"--data_dir: {self.description} would be read by one machine for all hosts of "
                    "the TPU. Prepare the text once, where all of them can read it: python -m "
                    f"inputs.text.prepare --input={data_dir or 'TEXT'} --vocab={vocab or 'VOCAB'} "
                    "--output=gs://BUCKET/FOLDER"
                )
            data_dir = prepare_in_cache(
                data_dir,
                vocab,
                recipe,
                known_case=known_case,
                records=records,
                cache_dir=cache_dir,
                log=log,
            )
            vocab = ""
        lower_case = load_manifest(data_dir)["lower_case"]
        known_case = lower_case, f"the text in {data_dir}, according to its {MANIFEST}"
        self._training, self._held_out, self.vocabulary, self.fingerprint = corpus.load_prepared(
            data_dir, vocab, records, cache_dir=cache_dir, log=log
        )
        self.lower_case = casing.choose(recipe.lower_case, self.vocabulary, known_case)
        log(casing.report(self.lower_case, self.vocabulary))
        training, held_out = self._training.describe(), self._held_out.describe()
        self.amount = f"To train on: {training}; held out: {held_out}"
        log(self.amount)

    def training_examples(self, phase, seed):
        return self._examples("training", phase, seed, self._recipe.sequences_per_row)

    def held_out_examples(self, phase):
        return self._examples("held_out", phase, EVALUATION_SEED, 1)

    def _examples(self, side, phase, seed, per_row):
        """The examples of one side of the corpus; made once, as they keep account of damage."""
        key = side, phase.sequence_length, seed
        if key not in self._made:
            made = self._make(side, phase, seed, per_row, "-".join(map(str, key)))
            if made.plan is not None:
                self._log(made.describe_packing())
            self._made[key] = made
        return self._made[key]

    def _make(self, side, phase, seed, per_row, name):
        return examples.Examples(
            self._training if side == "training" else self._held_out,
            self.vocabulary,
            sequence_length=phase.sequence_length,
            predictions=phase.predictions,
            whole_word=self._recipe.whole_word,
            packing=self._recipe.packing,
            sequences_per_row=per_row,
            seed=seed,
            lanes=self._recipe.lanes,
            bad_records=BadRecords(
                self._recipe.max_bad_record_share,
                skip=self._recipe.on_bad_record == "skip",
                log=self._log,
            ),
            damage_folder=self._damage_dir and os.path.join(self._damage_dir, name),
        )

    def check(self):
        """Reports what was found damaged since the last call; see `Damage.collect`."""
        for made in self._made.values():
            made.damage.collect()

    def masked_sentences(self) -> list[tuple[str, str]]:
        """Returns a few pairs: a held-out sentence with one whole word masked, and that word."""
        found = []
        bounds = next(self._held_out.sentences.blocks())[: SEARCHED_SENTENCES + 1].tolist()
        ranges = list(itertools.pairwise(bounds))
        for tokens in self._held_out.tokens.slices(ranges):
            pieces = [self.vocabulary[i] for i in tokens]
            pieces = pieces[: len(pieces) - (pieces[-1] == vocabulary.SEP)]
            whole_words = [
                i
                for i, piece in enumerate(pieces[:-1])
                if piece.isalpha() and len(piece) > 3 and not pieces[i + 1].startswith("##")
            ]
            if 6 <= len(pieces) <= 24 and whole_words and vocabulary.UNK not in pieces:
                middle = whole_words[len(whole_words) // 2]
                word, pieces[middle] = pieces[middle], vocabulary.MASK
                found.append((" ".join(pieces).replace(" ##", ""), word))
        if not found:
            return [("no held-out sentence has 6 to 24 pieces [MASK]", "?")]
        return found[:: max(1, len(found) // SHOWN_SENTENCES)][:SHOWN_SENTENCES]


class _SyntheticText:
    """Random word pieces in sequences of the phase's length."""

    description = fingerprint = amount = made_up.DESCRIPTION

    def __init__(self, recipe, vocab, seed):
        if vocab:
            self.vocabulary = vocabulary.load_vocabulary(vocab)
        else:
            self.vocabulary = made_up.synthetic_vocabulary(recipe.vocabulary_size)
        self.lower_case = casing.choose(recipe.lower_case, self.vocabulary)
        self._per_row = recipe.sequences_per_row
        self._seed = seed

    def training_examples(self, phase, seed):
        del seed
        per_row = self._per_row
        if per_row == 1:
            return self.held_out_examples(phase)
        length = phase.sequence_length
        bounds = {"sequence_ids": per_row + 1, "positions": length, "sequence_starts": length}
        return self._examples(
            phase, lambda size: packed_spec(size, length, phase.predictions, per_row), bounds
        )

    def held_out_examples(self, phase):
        length = phase.sequence_length
        return self._examples(phase, lambda size: element_spec(size, length, phase.predictions))

    def _examples(self, phase, spec, bounds=None):
        upper_bounds = {
            "input_word_ids": len(self.vocabulary),
            "masked_lm_ids": len(self.vocabulary),
            "masked_lm_positions": phase.sequence_length,
            "next_sentence_labels": 2,
        }
        return made_up.SyntheticExamples(spec, upper_bounds | (bounds or {}), self._seed)

    def check(self):
        pass

    def masked_sentences(self):
        return [("word1 [MASK] word2", "word3")]
