"""BERT pre-training as a task: data, model, losses, export and report from a recipe."""

import itertools
import os

import numpy as np

from export.bert import pretrained_export
from export.model_card import make_card
from export.saved_model import run_client, write_export
from inputs import shards, synthetic
from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.text import chunks, corpus, documents, installed_text, vocabulary
from inputs.text import examples as text
from inputs.text import prepared as prepared_text
from models import bert
from training.checkpoint.manager import saved_step

SHOWN_SENTENCES, SEARCHED_SENTENCES = 4, 20_000
USAGE = """\
import tensorflow_text  # its kernels

fill, encode = (model.signatures[name] for name in ("serving_default", "encode"))
fill(text=tf.constant(["the [MASK] of the array"]))  # tokens, probabilities: [N, masks, 5]
encode(text=tf.constant(["a sentence"]))  # pooled_output: [N, H]; sequence_output: [N, L, H]"""


class BertPretraining:
    """Masked-LM and next-sentence pre-training.

    Args:
        recipe: a `recipes.bert.BertRecipe`.
        data_dir: files, globs or folders of text, comma-separated; or a folder that
            `inputs.text.prepare` made; or "" for the English that every installation has.
        vocab: path of a vocab.txt, or "" to learn one from the text.
        model_dir: where a learned vocabulary is kept, for the next start.
        seed: int, decides order, pairs and masks.
        synthetic_data: makes batches up instead of reading text.
        log: takes lines about what is read.

    Raises:
        InputError: text or vocabulary cannot be used.
    """

    unit = "sequences"
    sums = staticmethod(bert.pretraining_sums)
    counts = staticmethod(bert.pretraining_counts)
    best_metric = "masked_accuracy"

    def __init__(self, recipe, *, data_dir, vocab, model_dir, seed, synthetic_data, log):
        if recipe.model not in bert.SIZES:
            raise InputError(
                f"--set model={recipe.model}: no such size. There are: {', '.join(bert.SIZES)}."
            )
        self.recipe, self._seed, self._synthetic = recipe, seed, synthetic_data
        if synthetic_data:
            words = (f"word{i}" for i in range(recipe.vocabulary_size))
            made_up = [*vocabulary.SPECIAL_TOKENS, *words][: recipe.vocabulary_size]
            self.vocabulary = vocabulary.load_vocabulary(vocab) if vocab else made_up
            self.data = self.fingerprint = self.amount = "synthetic data"
            return
        records = BadRecords(
            recipe.max_bad_record_share, skip=recipe.on_bad_record == "skip", say=log
        )
        self.data = data_dir or "Python's help topics and installed packages' docstrings"
        log(f"Reading {self.data}")
        if not vocab and saved_step(model_dir):  # a run that goes on keeps what it learned
            vocab = os.path.join(model_dir, "vocab.txt")
        if data_dir and shards.is_prepared(data_dir):
            prepared = prepared_text.load_prepared(data_dir, vocab, records)
            self._training, self._held_out, self.vocabulary, self.fingerprint = prepared
        else:
            self._tokenize(data_dir, vocab, records, log)
        self.amount = f"To train on: {self._training.size}; held out: {self._held_out.size}"
        log(self.amount)

    def _tokenize(self, data_dir, vocab, records, log):
        """Raw text, or the installation's, in memory."""
        files = documents.find_files(data_dir) if data_dir else []

        def read():
            if files:
                return documents.read_documents(files, records)
            return installed_text.read_installed_text()

        if vocab:
            self.vocabulary = vocabulary.load_vocabulary(vocab)
            tokenized = corpus.tokenize(read(), self.vocabulary)
        else:
            kept = list(read())
            paragraphs = itertools.chain.from_iterable(kept)
            self.vocabulary = vocabulary.learn_vocabulary(paragraphs, self.recipe.vocabulary_size)
            log(f"Learned a vocabulary of {len(self.vocabulary):,} word pieces")
            tokenized = corpus.tokenize(kept, self.vocabulary)
        self._training, self._held_out = corpus.split_held_out(tokenized)
        self.fingerprint = corpus.fingerprint(tokenized)

    @property
    def facts(self) -> dict[str, str]:
        """What the meaning of the weights depends on beside the recipe."""
        return {"vocabulary": vocabulary.vocabulary_hash(self.vocabulary), "data": self.fingerprint}

    def write_files(self, model_dir: str) -> None:
        """Keeps beside the checkpoints what a later start needs."""
        vocabulary.save_vocabulary(self.vocabulary, os.path.join(model_dir, "vocab.txt"))

    def build_model(self):
        """The network, on the strategy in scope."""
        return bert.build_pretrainer(
            bert.SIZES[self.recipe.model],
            len(self.vocabulary),
            self.recipe.max_sequence_length,
            dropout=self.recipe.dropout,
            initializer_stddev=self.recipe.initializer_stddev,
        )

    def train_batches(self, number: int, first_step: int):
        """`context -> tf.data.Dataset` of phase `number` (from 0), from its `first_step` on."""
        phase = self.recipe.phases[number]
        if self._synthetic:
            return lambda context: self._made_up(phase, context)
        examples = self._examples(self._training, phase, self._seed + number)
        return lambda context: examples.training_batches(
            phase.global_batch_size, context, first_step
        )

    def evaluation_batches(self, number: int):
        """`context -> tf.data.Dataset` of the held-out text, as phase `number` cuts it."""
        phase = self.recipe.phases[number]
        if self._synthetic:
            return lambda context: self._made_up(phase, context).take(2)
        examples = self._examples(self._held_out, phase, seed=0)  # masked alike in every run
        return lambda context: examples.evaluation_batches(
            phase.global_batch_size, self.recipe.evaluation_examples, context
        )

    def _examples(self, documents, phase, seed):
        return text.Examples(
            documents,
            self.vocabulary,
            sequence_length=phase.sequence_length,
            predictions=phase.predictions,
            whole_word=self.recipe.whole_word,
            packing=self.recipe.packing,
            seed=seed,
        )

    def _made_up(self, phase, context):
        size = phase.global_batch_size // (context.num_replicas_in_sync if context else 1)
        spec = text.element_spec(size, phase.sequence_length, phase.predictions)
        below = {
            "input_word_ids": len(self.vocabulary),
            "masked_lm_ids": len(self.vocabulary),
            "masked_lm_positions": phase.sequence_length,
            "next_sentence_labels": 2,
        }
        return synthetic.synthetic_batches(spec, below, self._seed)

    def final_metrics(self, model, strategy, model_dir: str | None) -> dict[str, float]:
        """What is measured once, at the end: nothing beyond the last evaluation."""
        del model, strategy, model_dir
        return {}

    def results(self, metrics: dict[str, float]) -> dict[str, float]:
        """`metrics`, and the masked-token accuracy of always giving the likeliest answer."""
        counts = np.zeros(len(self.vocabulary))
        for batch in self.evaluation_batches(len(self.recipe.phases) - 1)(None):
            labels, weights = batch["masked_lm_ids"].numpy(), batch["masked_lm_weights"].numpy()
            counts += np.bincount(labels.ravel(), weights.ravel(), minlength=len(counts))
        return metrics | {"frequent_token": counts.max() / counts.sum()}

    def in_words(self, results: dict[str, float]) -> str:
        """What `results` say about the held-out text."""
        accuracy, baseline = results["masked_accuracy"], results["frequent_token"]
        words = (
            f"masked-token accuracy {accuracy:.3f}, {accuracy / baseline:.1f} times the "
            f"{baseline:.3f} of always guessing the most frequent token"
        )
        if self.recipe.packing == chunks.FULL:
            return words
        return f"{words}; next-sentence accuracy {results['sentence_accuracy']:.3f}"

    def show(self, export_dir: str) -> None:
        """Prints what the SavedModel fills in, loaded in a process of its own."""
        print(
            "Filled in, by the SavedModel in a process of its own, in held-out sentences:",
            flush=True,
        )
        questions = self._questions() or [
            ("no sentence of 6 to 24 pieces was held out [MASK]", "?")
        ]
        sentences, words = zip(*questions, strict=True)
        run_client(export_dir, *sentences)
        print(f"The words behind the masks: {', '.join(words)}")

    def _questions(self) -> list[tuple[str, str]]:
        """(held-out sentence, one word of it masked; that word), a few or none, to be shown."""
        if self._synthetic:
            return [("word1 [MASK] word2", "word3")]
        held_out, chosen = self._held_out, []
        bounds = held_out.sentences[: SEARCHED_SENTENCES + 1].tolist()
        for start, end in itertools.pairwise(bounds):
            pieces = [self.vocabulary[i] for i in held_out.tokens[start:end]]
            pieces = pieces[: len(pieces) - (pieces[-1] == vocabulary.SEP)]
            whole = [
                i
                for i, piece in enumerate(pieces[:-1])
                if piece.isalpha() and len(piece) > 3 and not pieces[i + 1].startswith("##")
            ]
            if 6 <= len(pieces) <= 24 and whole and vocabulary.UNK not in pieces:
                middle = whole[len(whole) // 2]
                word, pieces[middle] = pieces[middle], vocabulary.MASK
                chosen.append((" ".join(pieces).replace(" ##", ""), word))
        return chosen[:: max(1, len(chosen) // SHOWN_SENTENCES)][:SHOWN_SENTENCES]

    def export(self, model, export_dir: str, results: dict[str, float]) -> None:
        """Writes the SavedModel that fills masks and encodes sentences."""
        card = make_card(self, model.count_params(), results, USAGE)
        made = pretrained_export(model, self.vocabulary, self.recipe.max_sequence_length)
        write_export(made, card, export_dir)
