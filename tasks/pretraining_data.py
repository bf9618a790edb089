"""The examples of BERT pre-training: from text, from masked records, or synthetic."""

import itertools
import os
import re
from collections.abc import Callable, Iterable

from inputs.errors import InputError
from inputs.shards import MANIFEST, is_prepared
from inputs.storage.files import cache_folder, is_file
from inputs.text import corpus, examples, pretraining_records
from inputs.text.batches import element_spec
from inputs.text.chunks import PAIRS
from inputs.text.packing import LengthBuckets, PackedRows
from inputs.text.prepare import prepare_in_cache
from inputs.text.record_files import find_record_files
from inputs.text.shards import load_manifest
from inputs.text.tokenization import casing, vocabulary
from tasks import synthetic as synthetic_data

SHOWN_SENTENCES = 4
SEARCHED_SENTENCES = 20_000
EVALUATION_SEED = 0  # so that held-out text is masked in the same way in every run
VOCABULARY = "vocab.txt"


def open_data(
    recipe,
    data_dir: str,
    vocab: str,
    known_case: tuple[bool, str] | None,
    *,
    log: Callable[[str], object],
    cache_dir: str,
    shared_dir: str,
    reports,
):
    """Opens `--data_dir`: TFRecord files of masked examples, or text.

    Args:
        recipe: a `recipes.bert.BertRecipe`.
        known_case: see `inputs.text.tokenization.casing.choose`.

    The other arguments are those of `tasks.bert.BertPretraining`.

    Raises:
        InputError: the data cannot be used.
    """
    records = None
    if data_dir and not is_prepared(data_dir):
        records = find_record_files(data_dir, log)
    if records is None:
        return Text(recipe, data_dir, vocab, known_case, log, cache_dir, shared_dir, reports)
    return Records(
        recipe, data_dir, vocab, known_case, log, cache_dir, shared_dir, reports, *records
    )


def joined_layout(recipe, phase) -> PackedRows | LengthBuckets | None:
    """How the sequences of a phase are joined to examples; None if each is one."""
    if recipe.length_buckets:
        longest = phase.sequence_length
        return LengthBuckets(tuple(min(length, longest) for length in recipe.length_buckets))
    if recipe.sequences_per_row > 1:
        return PackedRows(phase.sequence_length, recipe.sequences_per_row)
    return None


class _Source:
    """Training and held-out examples, made once for each phase, as they keep account of damage.

    Attributes:
        vocabulary: word pieces.
        lower_case: whether the text is lower-cased.
        fingerprint: identifies the data.
        description, amount: see `data` and `amount` of `tasks.task.Task`.
    """

    def __init__(self, recipe, data_dir, log, reports):
        self._recipe = recipe
        self._log = log
        self._reports = reports
        self._made: dict = {}
        self.description = data_dir or "Python's help topics and installed packages' docstrings"

    def training_examples(self, phase, seed):
        """The training examples of a phase, an `inputs.text.batches.Batches`."""
        return self._examples("training", phase, seed, joined_layout(self._recipe, phase))

    def held_out_examples(self, phase):
        """The held-out examples in the lengths of a phase."""
        return self._examples("held_out", phase, EVALUATION_SEED, None)

    def _examples(self, side, phase, seed, layout):
        key = side, phase.sequence_length, seed
        if key not in self._made:
            name = "-".join(map(str, key))
            made = self._make(
                side,
                sequence_length=phase.sequence_length,
                predictions=phase.predictions,
                seed=seed,
                layout=layout,
                lanes=self._recipe.lanes,
                bad_records=self._reports.bad_records(self._recipe),
                damage_folder=self._reports.folder_of(name),
            )
            if layout:
                self._log(made.describe_plan())
            # A shorter phase computes the same lengths, cut, and decides nothing about them.
            longest = max(phase.sequence_length for phase in self._recipe.phases)
            if isinstance(layout, LengthBuckets) and phase.sequence_length == longest:
                if proposal := made.propose_lengths():
                    self._log(proposal)
            self._made[key] = made
        return self._made[key]

    def damage(self):
        """See `tasks.task.Task.damage`."""
        return [made.damage for made in self._made.values()]

    def _with_masks(self, sentences: Iterable[list[str]]) -> list[tuple[str, str]]:
        """Returns a few pairs: a sentence with one whole word masked, and that word."""
        found = []
        for sentence in sentences:
            pieces = sentence[: len(sentence) - (sentence[-1:] == [vocabulary.SEP])]
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


class Text(_Source):
    """Training and held-out documents as word pieces, masked on the fly."""

    def __init__(self, recipe, data_dir, vocab, known_case, log, cache_dir, shared_dir, reports):
        super().__init__(recipe, data_dir, log, reports)
        records = reports.bad_records(recipe)
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

    def _make(self, side, **arguments):
        return examples.Examples(
            self._training if side == "training" else self._held_out,
            self.vocabulary,
            whole_word=self._recipe.whole_word,
            packing=self._recipe.packing,
            **arguments,
        )

    def masked_sentences(self) -> list[tuple[str, str]]:
        """Returns a few pairs: a held-out sentence with one whole word masked, and that word."""
        bounds = next(self._held_out.sentences.blocks())[: SEARCHED_SENTENCES + 1].tolist()
        sentences = self._held_out.tokens.slices(itertools.pairwise(bounds))
        return self._with_masks([self.vocabulary[i] for i in ids] for ids in sentences)


class Records(_Source):
    """Examples that another program masked and wrote as TFRecords."""

    def __init__(
        self,
        recipe,
        data_dir,
        vocab,
        known_case,
        log,
        cache_dir,
        shared_dir,
        reports,
        training,
        held_out,
    ):
        super().__init__(recipe, data_dir, log, reports)
        if recipe.whole_word or recipe.packing != PAIRS:
            raise InputError(
                f"--data_dir: {training[0]} holds masked examples, on which whole_word and packing "
                "have no effect. Leave them out, or give the text that the examples are made of."
            )
        if shared_dir and not cache_dir:
            raise InputError(
                f"--cache_dir is needed: where the records of {data_dir} begin is written there by "
                "one machine for all hosts. Give a folder that all of them can read, or run this "
                "program on the TPU's own machines, with --tpu=local."
            )
        if not vocab:
            beside = os.path.join(data_dir, VOCABULARY)
            if not is_file(beside):
                raise InputError(
                    f"--vocab is needed: {training[0]} holds ids, not text. Give the vocab.txt "
                    f"that the examples were made with, or put it into {data_dir}."
                )
            vocab = beside
        self.vocabulary = vocabulary.load_vocabulary(vocab)
        self.lower_case = casing.choose(recipe.lower_case, self.vocabulary, known_case)
        cache = os.path.expanduser(cache_dir) if cache_dir else cache_folder()
        self._training, self._held_out = pretraining_records.open_records(
            training, held_out, reports.bad_records(recipe), cache_dir=cache, log=log
        )
        for files in (self._training, self._held_out):
            pretraining_records.check_vocabulary(files, self.vocabulary)
        # With the counts, because the fingerprints do not tell a file whose damage was repaired.
        self.fingerprint = "-".join(
            f"{files.fingerprint}-{files.count}" for files in (self._training, self._held_out)
        )
        counts = [f"{files.count:,}" for files in (self._training, self._held_out)]
        self.amount = f"To train on: {counts[0]} masked sequences; held out: {counts[1]}"
        log(self.amount)

    def _make(self, side, **arguments):
        files = self._training if side == "training" else self._held_out
        return pretraining_records.RecordExamples(files, len(self.vocabulary), **arguments)

    def masked_sentences(self) -> list[tuple[str, str]]:
        """See `Text.masked_sentences`."""
        phase = self._recipe.phases[-1]
        segments = self.held_out_examples(phase).first_segments(phase.global_batch_size)
        text = (" ".join(self.vocabulary[i] for i in ids[1:]) for ids in segments)
        sentences = (part for some in text for part in re.split(r"(?<= [.!?]) ", some))
        return self._with_masks(part.split() for part in sentences)


class Synthetic:
    """Random word pieces in sequences of the phase's length."""

    description = fingerprint = amount = synthetic_data.DESCRIPTION

    def __init__(self, recipe, vocab, seed):
        if vocab:
            self.vocabulary = vocabulary.load_vocabulary(vocab)
        else:
            self.vocabulary = synthetic_data.synthetic_vocabulary(recipe.vocabulary_size)
        self.lower_case = casing.choose(recipe.lower_case, self.vocabulary)
        self._recipe = recipe
        self._seed = seed

    def training_examples(self, phase, seed):
        """See `Text`."""
        del seed
        layout = joined_layout(self._recipe, phase)
        if layout is None:
            return self.held_out_examples(phase)
        bounds = {"sequence_ids": layout.columns + 1}
        bounds |= dict.fromkeys(("positions", "sequence_starts"), phase.sequence_length)
        return self._examples(lambda size: layout.spec(size, phase.predictions), bounds)

    def held_out_examples(self, phase):
        """See `Text`."""
        length = phase.sequence_length
        return self._examples(lambda size: element_spec(size, length, phase.predictions), {})

    def _examples(self, spec, bounds):
        # Buckets have such a tensor each; places of masks must be in the shortest.
        of_tokens = {k: x.shape[-1] for k, x in spec(1).items() if k.startswith("input_word_ids")}
        bounds |= dict.fromkeys((*of_tokens, "masked_lm_ids"), len(self.vocabulary))
        bounds |= {"masked_lm_positions": min(of_tokens.values()), "next_sentence_labels": 2}
        return synthetic_data.SyntheticExamples(spec, bounds, self._seed)

    def damage(self):
        """Nothing can be damaged."""
        return ()

    def masked_sentences(self) -> list[tuple[str, str]]:
        """See `Text.masked_sentences`."""
        return [("word1 [MASK] word2", "word3")]
