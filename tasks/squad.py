"""SQuAD v1.1: fine-tuning a pre-trained BERT to answer questions."""

import dataclasses
import os

from export.model_card import make_card
from export.saved_model import run_client, write_export
from export.squad import answering_export
from inputs.damage import Reports
from inputs.errors import InputError
from inputs.squad import examples
from inputs.squad import files as squad_files
from inputs.storage.files import exists
from inputs.text.tokenization import casing, vocabulary
from models import bert
from models import squad as span_model
from tasks import initial_weights, squad_answers
from tasks import synthetic as synthetic_data
from tasks.task import Metric, Task, loss_metric

SHOWN_CHARACTERS = 2_000
PUBLISHED_VOCABULARY_SIZE = 30_522  # word pieces; google-research/bert
RANDOM = "random"  # the value of init_from for untrained weights
POSITIONS = 512  # rows of the position table without a checkpoint
TYPES = 2  # rows of the segment table without a checkpoint
USAGE = """\
import tensorflow_text  # its kernels

answer = model.signatures["serving_default"]
answer(question=tf.constant(["Who wrote it?"]), context=tf.constant(["Ada wrote it in 1843."]))
# answer: [N] strings; start, end: [N] characters; score: [N]"""


class SquadFineTuning(Task):
    """Fine-tuning of a pre-trained BERT for question answering.

    Args:
        recipe: a `recipes.squad.SquadRecipe`.
        data_dir: a folder with the training and the dev file, or both files, comma-separated.
        vocab: path of a vocab.txt, or "" if there is one beside the initial checkpoint.
        resume_dir: see `tasks.task.Task`. A resumed run does not read the initial weights.
        seed: int, seed of the order of the examples.
        synthetic: whether to use random batches instead of questions.
        log: takes lines of progress.
        cache_dir: not used.
        shared_dir: see `tasks.task.Task`; the windows are written there.
        reports: see `tasks.task.Task`.
    """

    example_unit = "windows"
    metrics = (
        loss_metric("span_loss", "span"),
        Metric("span_accuracy", "span", higher_is_better=True),
    )
    best_metric = metrics[0]

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
        del cache_dir
        if recipe.model not in bert.SIZES:
            raise InputError(
                f"--set model={recipe.model}: no such size. Sizes: {', '.join(bert.SIZES)}."
            )
        self._encoder = _find_encoder(recipe, synthetic)
        self.vocabulary = _find_vocabulary(vocab, self._encoder, synthetic, log)
        known = _known_case(self.vocabulary, self._encoder, resume_dir)
        lower_case = casing.choose(recipe.lower_case, self.vocabulary, known)
        log(casing.report(lower_case, self.vocabulary))
        self.recipe = recipe = dataclasses.replace(recipe, lower_case=lower_case)
        if synthetic:
            self._source = _SyntheticQuestions(recipe, len(self.vocabulary), seed)
        else:
            self._source = _Questions(
                recipe, data_dir, self.vocabulary, seed, log, shared_dir, reports or Reports(log)
            )
        self.data = self._source.description
        self.amount = self._source.amount
        self.facts = {
            "vocabulary": vocabulary.vocabulary_hash(self.vocabulary),
            "data": self._source.fingerprint,
        }
        self._initial_weights = {}
        if self._encoder and not resume_dir:
            self._initial_weights = initial_weights.read_encoder(self._encoder)
            log(f"Starting from the encoder in {self._encoder.checkpoint}")

    def write_files(self, model_dir):
        """Writes vocab.txt."""
        vocabulary.save_vocabulary(self.vocabulary, os.path.join(model_dir, "vocab.txt"))

    def build_model(self):
        """Returns the encoder, with its initial weights, and the span head."""
        encoder = self._encoder
        model = span_model.build_span_labeler(
            bert.SIZES[self.recipe.model],
            encoder.vocabulary_size if encoder else len(self.vocabulary),
            encoder.max_sequence_length if encoder else POSITIONS,
            types=encoder.types if encoder else TYPES,
            dropout=self.recipe.dropout,
            initializer_stddev=self.recipe.initializer_stddev,
            remat=self.recipe.remat,
        )
        variables = bert.encoder_variables(bert.encoder_of(model))
        for name, value in self._initial_weights.items():
            variables[name].assign(value)
        self._initial_weights = {}  # frees the host memory
        return model

    def sums(self, model, batch, training):
        """See `models.squad.span_sums`."""
        return span_model.span_sums(model, batch, training)

    def counts(self, batch):
        """See `models.squad.span_counts`."""
        return span_model.span_counts(batch)

    def train_batches(self, phase_index, first_step):
        """Windows of the training questions."""
        batch_size = self.recipe.phases[phase_index].global_batch_size
        return lambda context: self._source.training.training_batches(
            batch_size, context, first_step
        )

    def order(self, phase_index):
        """See `tasks.task.Task.order`."""
        return self._source.training.order(self.recipe.phases[phase_index].global_batch_size)

    def files_read(self, phase_index, context, steps):
        """See `tasks.task.Task.files_read`."""
        del phase_index, context, steps
        return self._source.training.files

    def evaluation_batches(self, phase_index):
        """The first `evaluation_examples` windows of the dev file, for the loss."""
        batch_size = self.recipe.phases[phase_index].global_batch_size
        return lambda context: self._source.dev.evaluation_batches(
            batch_size, self.recipe.evaluation_examples, context
        )

    def final_metrics(self, model, strategy, output_dir):
        """Answers all dev questions; returns `exact_match` and `f1`, in percent.

        Writes predictions.json and nbest.json to `output_dir`.
        """
        return self._source.answer_all(model, strategy, output_dir)

    def describe(self, results):
        """Exact match and F1, or the loss if the data is synthetic."""
        if "f1" not in results:
            return f"loss {results['span_loss']:.3f} on {self.data}"
        return (
            f"exact match {results['exact_match']:.2f}, F1 {results['f1']:.2f} on all "
            f"{len(self._source.dev.squad.questions):,} dev questions"
        )

    def export(self, model, export_dir, results, steps=None):
        """Writes a SavedModel that answers questions."""
        card = make_card(self, model.count_params(), results, USAGE, steps)
        export = answering_export(
            model, self.vocabulary, self.recipe, lower_case=self.recipe.lower_case
        )
        write_export(export, card, export_dir)

    def demonstrate(self, export_dir):
        """Prints the SavedModel's answer to a question of the dev file."""
        # Command-line arguments have a limited length and cannot contain NUL.
        question, context = (
            text[:SHOWN_CHARACTERS].replace("\0", " ") for text in self._source.sample_question()
        )
        print("Questions answered by the SavedModel, in a separate process:", flush=True)
        run_client(export_dir, context, question)


def _find_encoder(recipe, synthetic):
    """Returns the recipe's initial `initial_weights.Encoder`; None for untrained weights."""
    if recipe.init_from not in ("", RANDOM):
        encoder = initial_weights.find_encoder(recipe.init_from)
        initial_weights.check_size(encoder, recipe.model, recipe.sequence_length)
        return encoder
    if recipe.init_from != RANDOM and not synthetic:
        raise InputError(
            f"{recipe.name} fine-tunes a pre-trained BERT. Give its folder with "
            "--set init_from=DIR, or --set init_from=random for untrained weights."
        )
    if recipe.sequence_length > POSITIONS:
        raise InputError(
            f"--set sequence_length={recipe.sequence_length}: the position table has only "
            f"{POSITIONS} rows. Set at most {POSITIONS}."
        )
    return None


def _find_vocabulary(vocab, encoder, synthetic, log) -> list[str]:
    beside = encoder.vocabulary_file if encoder else ""
    known = bool(beside) and exists(beside)
    if not vocab and not known:
        if synthetic and not encoder:
            return synthetic_data.synthetic_vocabulary(PUBLISHED_VOCABULARY_SIZE)
        raise InputError(
            "--vocab is needed: there is no vocab.txt beside the checkpoint of --set init_from."
            if encoder
            else "--vocab is needed with --set init_from=random."
        )
    pieces = vocabulary.load_vocabulary(vocab or beside)
    if vocab and known and pieces != vocabulary.load_vocabulary(beside):
        raise InputError(
            f"--vocab: {vocab} differs from {beside}, the vocabulary that the checkpoint was "
            "trained with. Leave --vocab out."
        )
    if encoder and len(pieces) < encoder.vocabulary_size:
        rows = encoder.vocabulary_size
        log(
            f"{encoder.checkpoint} has embeddings of {rows:,} word pieces, {rows - len(pieces):,} "
            f"more than {vocab or beside} lists. If they are padding, all is well: no text has "
            "them, and they are kept. If not, this is another vocabulary than the checkpoint's"
        )
    if encoder and len(pieces) > encoder.vocabulary_size:
        raise InputError(
            f"--vocab: {vocab or beside} has {len(pieces):,} word pieces, but "
            f"{encoder.checkpoint} has embeddings of only {encoder.vocabulary_size:,}. "
            "Give the vocabulary that the checkpoint was trained with."
        )
    return pieces


def _known_case(pieces, encoder, resume_dir) -> tuple[bool, str] | None:
    """What the run to resume or the initial checkpoint was trained with, for `casing.choose`."""
    folders = [resume_dir] if resume_dir else []
    if encoder:
        folders.append(os.path.dirname(encoder.checkpoint))
    for folder in folders:
        if found := casing.of_checkpoint(folder):
            return found
    if not encoder:
        return None
    cased = casing.is_cased(pieces)
    has = "has" if cased else "has no"
    return not cased, f"the vocabulary of {encoder.checkpoint}, which {has} capitals or accents"


class _Questions:
    """The windows of the training and the dev file."""

    def __init__(self, recipe, data_dir, pieces, seed, log, shared_dir, reports):
        self._recipe = recipe
        files = squad_files.find_files(data_dir)
        self.description = " and ".join(files)
        log(f"Reading {self.description}")
        records = reports.bad_records(recipe)
        read = [squad_files.read_squad(files[0], records), squad_files.read_squad(files[1])]
        self.fingerprint = "-".join(file.fingerprint for file in read)
        self.training, self.dev = (
            examples.Features(
                file,
                pieces,
                lower_case=recipe.lower_case,
                sequence_length=recipe.sequence_length,
                max_query_length=recipe.max_query_length,
                doc_stride=recipe.doc_stride,
                seed=seed,
                lanes=recipe.lanes,
                shared_dir=shared_dir and os.path.join(shared_dir, "squad-windows"),
            )
            for file in read
        )
        self.amount = "; ".join(
            f"{len(windows.squad.questions):,} questions {use}, "
            f"in {windows.num_examples:,} windows of {recipe.sequence_length}"
            for windows, use in ((self.training, "to train on"), (self.dev, "to answer"))
        )
        log(self.amount)
        if count := int((~self.dev.placed).sum()):
            log(
                f"{count:,} dev questions have no answer at its answer_start. They are scored by "
                "the texts of their answers, and do not count in the loss"
            )
        log(f"Contexts to train on: {self.training.report_unknown()}")

    def answer_all(self, model, strategy, output_dir) -> dict[str, float]:
        batch_size = self._recipe.phases[-1].global_batch_size
        spans = squad_answers.predict_spans(model, strategy, self.dev, self._recipe, batch_size)
        answers = squad_answers.n_best_answers(self.dev, spans, self._recipe.n_best)
        if output_dir:
            squad_answers.write_answers(output_dir, answers)
        return squad_answers.metrics(self.dev.squad, squad_answers.predictions(answers))

    def sample_question(self) -> tuple[str, str]:
        """(question, context) of the first dev question."""
        question = self.dev.squad.questions[0]
        return question.text, self.dev.squad.contexts[question.context]


class _SyntheticQuestions:
    """Random windows."""

    description = fingerprint = amount = synthetic_data.DESCRIPTION

    def __init__(self, recipe, vocabulary_size, seed):
        length = recipe.sequence_length
        self.training = self.dev = synthetic_data.SyntheticExamples(
            lambda size: examples.element_spec(size, length),
            {
                "input_word_ids": vocabulary_size,
                "input_type_ids": TYPES,
                "start_positions": length,
                "end_positions": length,
            },
            seed,
        )

    def answer_all(self, model, strategy, output_dir) -> dict[str, float]:
        return {}

    def sample_question(self) -> tuple[str, str]:
        return "Who wrote it?", "A letter came. Ada Lovelace wrote it in 1843."
