"""SQuAD v1.1 fine-tuning as a task: data, model, loss, answers, export and report from a recipe."""

import os

from export.model_card import make_card
from export.saved_model import run_client, write_export
from export.squad import answering_export
from inputs import synthetic
from inputs.errors import InputError
from inputs.squad import features as squad_features
from inputs.squad import files as squad
from inputs.text import vocabulary
from models import bert
from models import squad as span_model
from tasks import initial_weights, squad_answers
from training.checkpoint.manager import saved_step

SHOWN = 2_000  # characters
PUBLISHED_VOCABULARY = 30_522  # word pieces; google-research/bert
RANDOM = "random"  # as init_from: no checkpoint
POSITIONS, TYPES = 512, 2  # of a BERT that no checkpoint describes
USAGE = """\
import tensorflow_text  # its kernels

answer = model.signatures["serving_default"]
answer(question=tf.constant(["Who wrote it?"]), context=tf.constant(["Ada wrote it in 1843."]))
# answer: [N] strings; start, end: [N] characters; score: [N]"""


class SquadFineTuning:
    """Question answering on a pre-trained BERT.

    Args: as `tasks.bert.BertPretraining`, with a `recipes.squad.SquadRecipe`;
        `data_dir` holds the training and the dev file, and `vocab` may be "" where the
        checkpoint to start from has a vocab.txt beside it.

    Raises:
        InputError: data, checkpoint or vocabulary cannot be used, or do not fit one another.
    """

    unit = "windows"
    sums = staticmethod(span_model.span_sums)
    counts = staticmethod(span_model.span_counts)
    best_metric = "span_loss"

    def __init__(self, recipe, *, data_dir, vocab, model_dir, seed, synthetic_data, log):
        if recipe.model not in bert.SIZES:
            raise InputError(
                f"--set model={recipe.model}: no such size. There are: {', '.join(bert.SIZES)}."
            )
        self.recipe, self._seed, self._synthetic = recipe, seed, synthetic_data
        self._saved, self._initial = None, {}
        if recipe.init_from not in ("", RANDOM):
            self._saved = initial_weights.find_encoder(recipe.init_from)
            initial_weights.check_size(self._saved, recipe.model, recipe.sequence_length)
        elif recipe.init_from != RANDOM and not synthetic_data:
            raise InputError(
                f"{recipe.name} fine-tunes a pre-trained BERT: name its folder with "
                "--set init_from=DIR, or take --set init_from=random for untrained weights."
            )
        elif recipe.sequence_length > POSITIONS:
            raise InputError(
                f"--set sequence_length={recipe.sequence_length} is beyond the position table, "
                f"which has {POSITIONS} rows. Take at most so many."
            )
        self.vocabulary = self._find_vocabulary(vocab)
        if synthetic_data:
            self.data = self.fingerprint = self.amount = "synthetic data"
        else:
            self._read(data_dir, log)
        if self._saved and not saved_step(model_dir):
            self._initial = initial_weights.read_encoder(self._saved)
            log(f"Starting from the encoder in {self._saved.checkpoint}")

    def _find_vocabulary(self, vocab):
        beside = self._saved.vocabulary_file if self._saved else ""
        if not vocab and not os.path.exists(beside):
            if self._synthetic and not self._saved:
                words = (f"word{i}" for i in range(PUBLISHED_VOCABULARY))
                return [*vocabulary.SPECIAL_TOKENS, *words][:PUBLISHED_VOCABULARY]
            raise InputError(
                "--vocab is needed: no vocab.txt stands beside the checkpoint of --set init_from."
                if self._saved
                else "--vocab is needed with --set init_from=random."
            )
        pieces = vocabulary.load_vocabulary(vocab or beside)
        if vocab and os.path.exists(beside) and pieces != vocabulary.load_vocabulary(beside):
            raise InputError(
                f"--vocab: {vocab} is not {beside}, the vocabulary that the checkpoint was trained "
                "with. Leave --vocab out."
            )
        if self._saved and len(pieces) != self._saved.vocabulary_size:
            raise InputError(
                f"--vocab: {vocab or beside} has {len(pieces):,} word pieces, but "
                f"{self._saved.checkpoint} has embeddings of {self._saved.vocabulary_size:,}. "
                "Give the vocabulary that the checkpoint was trained with."
            )
        return pieces

    def _read(self, data_dir, log):
        files = squad.find_files(data_dir)
        self.data = " and ".join(files)
        log(f"Reading {self.data}")
        read = [squad.read_squad(path) for path in files]
        self.fingerprint = "-".join(part.fingerprint for part in read)
        self._training, self._dev = (
            squad_features.Features(
                part,
                self.vocabulary,
                sequence_length=self.recipe.sequence_length,
                max_query_length=self.recipe.max_query_length,
                doc_stride=self.recipe.doc_stride,
                seed=self._seed,
            )
            for part in read
        )
        self.amount = "; ".join(
            f"{len(features.squad.questions):,} questions {use}, in {features.number:,} windows of "
            f"{self.recipe.sequence_length}"
            for features, use in ((self._training, "to train on"), (self._dev, "to answer"))
        )
        log(self.amount)

    @property
    def facts(self) -> dict[str, str]:
        """What the meaning of the weights depends on beside the recipe."""
        return {"vocabulary": vocabulary.vocabulary_hash(self.vocabulary), "data": self.fingerprint}

    def write_files(self, model_dir: str) -> None:
        """Keeps beside the checkpoints what a later start needs."""
        vocabulary.save_vocabulary(self.vocabulary, os.path.join(model_dir, "vocab.txt"))

    def build_model(self):
        """The network, on the strategy in scope, with the weights it starts from."""
        saved = self._saved
        model = span_model.build_span_labeler(
            bert.SIZES[self.recipe.model],
            len(self.vocabulary),
            saved.max_sequence_length if saved else POSITIONS,
            types=saved.types if saved else TYPES,
            dropout=self.recipe.dropout,
            initializer_stddev=self.recipe.initializer_stddev,
        )
        variables = bert.encoder_variables(bert.encoder_of(model))
        for name, value in self._initial.items():
            variables[name].assign(value)
        self._initial = {}
        return model

    def train_batches(self, number: int, first_step: int):
        """`context -> tf.data.Dataset` of phase `number` (from 0), from its `first_step` on."""
        size = self.recipe.phases[number].global_batch_size
        if self._synthetic:
            return lambda context: self._made_up(size, context)
        return lambda context: self._training.training_batches(size, context, first_step)

    def evaluation_batches(self, number: int):
        """`context -> tf.data.Dataset` of the dev file's first windows, for the loss."""
        size = self.recipe.phases[number].global_batch_size
        if self._synthetic:
            return lambda context: self._made_up(size, context).take(2)
        return lambda context: self._dev.evaluation_batches(
            size, self.recipe.evaluation_examples, context
        )

    def _made_up(self, global_batch_size, context):
        size = global_batch_size // (context.num_replicas_in_sync if context else 1)
        length = self.recipe.sequence_length
        below = {"input_word_ids": len(self.vocabulary), "input_type_ids": 2}
        below |= {"start_positions": length, "end_positions": length}
        spec = squad_features.element_spec(size, length)
        return synthetic.synthetic_batches(spec, below, self._seed)

    def final_metrics(self, model, strategy, model_dir: str | None) -> dict[str, float]:
        """Answers every dev question and measures the answers; kept in `model_dir`, if given."""
        if self._synthetic:
            return {}
        size = self.recipe.phases[-1].global_batch_size
        spans = squad_answers.predict_spans(model, strategy, self._dev, self.recipe, size)
        answers = squad_answers.n_best_answers(self._dev, spans, self.recipe.n_best)
        if model_dir:
            squad_answers.write_answers(model_dir, answers)
        return squad_answers.metrics(self._dev.squad, squad_answers.predictions(answers))

    def results(self, metrics: dict[str, float]) -> dict[str, float]:
        """The means of the last evaluation and the official figures, as they are kept."""
        return metrics

    def in_words(self, results: dict[str, float]) -> str:
        """The results as the report has them."""
        if self._synthetic:
            return f"loss {results['span_loss']:.3f} on made-up questions"
        return (
            f"exact match {results['exact_match']:.2f}, F1 {results['f1']:.2f} on all "
            f"{len(self._dev.squad.questions):,} dev questions"
        )

    def show(self, export_dir: str) -> None:
        """Prints what the SavedModel answers, loaded in a process of its own."""
        question, context = "Who wrote it?", "A letter came. Ada Lovelace wrote it in 1843."
        if not self._synthetic:
            chosen = self._dev.squad.questions[0]
            texts = chosen.text, self._dev.squad.contexts[chosen.context]
            # A command line bears neither every length nor every character.
            question, context = (text[:SHOWN].replace("\0", " ") for text in texts)
        print("Answered, by the SavedModel in a process of its own:", flush=True)
        run_client(export_dir, context, question)

    def export(self, model, export_dir: str, results: dict[str, float]) -> None:
        """Writes the SavedModel that answers questions."""
        card = make_card(self, model.count_params(), results, USAGE)
        write_export(answering_export(model, self.vocabulary, self.recipe), card, export_dir)
