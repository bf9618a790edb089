"""Recipes for pre-training BERT."""

import dataclasses

from recipes.types import BERT_EXCLUSIONS, Phase, Recipe, check_minimums

PACKINGS = ("pairs", "full-sentences")  # see inputs/text/chunks.py

# Of `length_buckets`: the number of places, and of different lengths.
LARGEST_GROUP = 64
MOST_BUCKETS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPhase(Phase):
    """A part of training with a constant sequence length and batch size."""

    sequence_length: int  # tokens per sequence
    predictions: int  # maximum of masked tokens per sequence

    def check(self, recipe):
        """Checks the fields, as `Phase.check` does."""
        super().check(recipe)
        check_minimums(self, sequence_length=5)
        if not 1 <= self.predictions < self.sequence_length:
            raise ValueError(
                "predictions must lie in [1, sequence_length). Received: "
                f"predictions={self.predictions}, sequence_length={self.sequence_length}."
            )
        if self.sequence_length > recipe.max_sequence_length:
            raise ValueError(
                f"sequence_length={self.sequence_length} is beyond the position table. Set "
                f"max_sequence_length={self.sequence_length} too, or a shorter sequence_length."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertRecipe(Recipe):
    """All settings of a BERT pre-training run except its text."""

    task: str = "bert"  # see `Recipe`
    exclude_from_weight_decay: tuple[str, ...] = BERT_EXCLUSIONS  # see `Recipe`
    # Whether to lower-case the text and drop its accents. None: as the shards, the run or the
    # vocabulary has it; a vocabulary that is learned from the text is lower-cased.
    lower_case: bool | None = None
    vocabulary_size: int = 30_522  # used when the vocabulary is learned from the text
    max_sequence_length: int = 512  # rows of the table of position embeddings
    dropout: float = 0.1  # rate, in all layers
    # Memory: "layer" keeps the inputs of each encoder layer for the backward pass, which computes
    # the rest again; "off" keeps everything.
    remat: str = "off"
    initializer_stddev: float = 0.02  # of matrices and embeddings, truncated at two deviations
    whole_word: bool = False  # mask whole words instead of word pieces
    packing: str = "pairs"  # of segments; or "full-sentences", without next-sentence labels
    # Maximum number of sequences that are packed into a row of a training batch, each as if it were
    # alone. If it is more than 1, examples and `global_batch_size` are rows.
    sequences_per_row: int = 1
    # Tokens of the places of a group, in ascending order, such as 64,96,128,128: each sequence of a
    # training batch has a place that is long enough for it, instead of one of `sequence_length`.
    # Examples and `global_batch_size` are groups. Lengths beyond the `sequence_length` of a phase
    # are cut to it. Empty: all places have `sequence_length`.
    length_buckets: tuple[int, ...] = ()
    init_from: str = ""  # weights to start from: a run's folder, or a BERT checkpoint (TF 1 or 2)
    init_slots: bool = False  # also start with the moments in `init_from`

    def check(self):
        """Checks the fields, as `Recipe.check` does."""
        super().check()
        check_minimums(self, vocabulary_size=6, sequences_per_row=1, initializer_stddev=0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1). Received: dropout={self.dropout}.")
        if self.packing not in PACKINGS:
            raise ValueError(
                f"packing must be one of {', '.join(PACKINGS)}. Received: packing={self.packing}."
            )
        self._check_buckets()
        if self.init_slots and not self.init_from:
            raise ValueError("init_slots needs a checkpoint with moments. Set init_from too.")
        if self.init_slots and self.optimizer != "lamb":
            raise ValueError(
                "init_slots reads the two moments of LAMB. Received: optimizer="
                f"{self.optimizer}. Set init_slots=false, or optimizer=lamb."
            )

    def _check_buckets(self):
        lengths = self.length_buckets
        if not lengths:
            return
        given = f"length_buckets={','.join(map(str, lengths))}"
        if self.sequences_per_row > 1:
            raise ValueError(
                f"sequences_per_row={self.sequences_per_row} and {given} exclude each other. Leave "
                "out one of them."
            )
        if list(lengths) != sorted(lengths) or lengths[0] < 5:
            raise ValueError(
                "length_buckets must be in ascending order, and at least 5 tokens each. Received: "
                f"{given}."
            )
        if len(lengths) > LARGEST_GROUP or len(set(lengths)) > MOST_BUCKETS:
            raise ValueError(
                f"length_buckets takes up to {LARGEST_GROUP} places, of up to {MOST_BUCKETS} "
                "different lengths, because the program of a step has the layers once for each. "
                f"Received: {len(lengths)} places of {len(set(lengths))} lengths."
            )
        longest = max(phase.sequence_length for phase in self.phases)
        if lengths[-1] < longest:
            raise ValueError(
                f"the last of length_buckets must be at least the sequence_length of {longest}, "
                f"which the longest sequences have. Received: {given}."
            )

    @property
    def sequences_per_example(self) -> int:
        """The largest number of sequences in an example of a training batch."""
        return len(self.length_buckets) or self.sequences_per_row


BERT_MINI_DEMO = BertRecipe(
    name="bert-mini-demo",
    reference="this project: as much as two CPU cores learn in three minutes",
    expected="masked-token accuracy of at least 4 times the most frequent token's",
    phases=(
        TextPhase(
            steps=2_000,
            global_batch_size=64,
            sequence_length=64,
            predictions=10,
            peak_learning_rate=0.01,
            warmup_steps=200,
        ),
    ),
    model="tiny",
    vocabulary_size=4_000,
    max_sequence_length=64,
    dropout=0.0,
    initializer_stddev=0.06,  # 0.02 at width 768, scaled with 1/sqrt(width)
    evaluation_examples=4_096,
    save_every_steps=500,
    telemetry=True,
)

BERT_MINI = BertRecipe(
    name="bert-mini",
    reference="this project: the mixed-batch run of arXiv:1904.00962v3, for two CPU cores",
    expected="no published figure",
    phases=(
        TextPhase(
            steps=1_800,
            global_batch_size=64,
            sequence_length=128,
            predictions=20,
            peak_learning_rate=0.005,
            warmup_steps=180,
        ),
        TextPhase(
            steps=400,
            global_batch_size=32,
            sequence_length=512,
            predictions=76,
            peak_learning_rate=0.0035,
            warmup_steps=40,
        ),
    ),
    model="mini",
    initializer_stddev=0.035,  # as in the demo, at width 256
    evaluation_examples=2_048,
    save_every_steps=200,
)

# The learning rate is 5/(2^k · 10³), with k = 0 for 32K. The warm-up is 3,125 steps at every batch
# size, which is 1/5 of 15,625 in the table. The decay is η₀(1 - t/T), and 9/10 of the epochs have
# length 128. The paper does not give a schedule for each phase. This project assumes that T is the
# length of the phase, and that the second phase warms up again from 0 to the same peak over the
# same share of its steps, as the paper says for the second stage of the mixed-batch run. The paper
# does not mention the slots at the end of the first phase. They are kept.
BERT_LARGE_32K = BertRecipe(
    name="bert-large-32k",
    reference="arXiv:1904.00962v3, Tables 1 and 5 (column 32K), section 4.1",
    expected="SQuAD v1.1 F1 91.475 after fine-tuning; 101.2 minutes on 1,024 TPUv3 chips",
    phases=(
        TextPhase(
            steps=14_063,
            global_batch_size=32_768,
            sequence_length=128,
            predictions=20,
            peak_learning_rate=5e-3,
            warmup_steps=3_125,
            decay_from=0,
            examples=460_800_000,
        ),
        TextPhase(
            steps=1_562,
            global_batch_size=32_768,
            sequence_length=512,
            predictions=76,
            peak_learning_rate=5e-3,
            warmup_steps=312,
            decay_from=0,
            examples=51_200_000,
        ),
    ),
    model="large",
    compute_dtype="bfloat16",
)


def _paper_column(label, batch, k, steps, f1, cost) -> BertRecipe:
    """Returns the recipe of another column of the paper's table.

    Args:
        label: String. The batch size in the name of the recipe.
        batch: Integer. The global batch size.
        k: Float. The exponent in the learning rate 5/(2^k · 10³).
        steps: Pair of integers. The steps of each phase.
        f1: String. The F1 score on SQuAD v1.1.
        cost: String. Time and number of chips.
    """
    phases = tuple(
        dataclasses.replace(
            phase, steps=n, global_batch_size=batch, peak_learning_rate=5 / (2**k * 10**3)
        )
        for phase, n in zip(BERT_LARGE_32K.phases, steps, strict=True)
    )
    return dataclasses.replace(
        BERT_LARGE_32K,
        name=f"bert-large-{label}",
        reference=f"arXiv:1904.00962v3, Tables 1 and 5 (column {label.upper()}), section 4.1",
        expected=f"SQuAD v1.1 F1 {f1} after fine-tuning; {cost} TPUv3 chips",
        phases=phases,
    )


PAPER_COLUMNS = (
    _paper_column("512", 512, 3.0, (900_000, 100_000), "91.752", "82.8 hours on 16"),
    _paper_column("1k", 1_024, 2.5, (450_000, 50_000), "91.761", "43.2 hours on 32"),
    _paper_column("2k", 2_048, 2.0, (225_000, 25_000), "91.946", "21.4 hours on 64"),
    _paper_column("4k", 4_096, 1.5, (112_500, 12_500), "91.137", "693.6 minutes on 128"),
    _paper_column("8k", 8_192, 1.0, (56_250, 6_250), "91.263", "390.5 minutes on 256"),
    _paper_column("16k", 16_384, 0.5, (28_125, 3_125), "91.345", "200.0 minutes on 512"),
    BERT_LARGE_32K,
)

# Versions 1 and 3 of the paper give steps and batch sizes of this run, but no learning rates. They
# follow the rule of Table 5, continued to 64K (k = -1/2), with the warm-up of that table.
BERT_LARGE_64K_32K = dataclasses.replace(
    BERT_LARGE_32K,
    name="bert-large-64k-32k",
    reference="arXiv:1904.00962v3, Table 1 (64K/32K), section 4.1; rates by Table 5's rule",
    expected="SQuAD v1.1 F1 90.584 after fine-tuning; 76.19 minutes on 1,024 TPUv3 chips",
    phases=(
        dataclasses.replace(
            BERT_LARGE_32K.phases[0],
            steps=7_037,
            global_batch_size=65_536,
            peak_learning_rate=5e-3 * 2**0.5,
            examples=None,
        ),
        dataclasses.replace(BERT_LARGE_32K.phases[1], examples=None),
    ),
)

# The numbers are those of the PyTorch script. The TensorFlow 1 script has one more step in the
# second phase. Which layers are adapted, and that the second phase resets the slots, is taken from
# NVIDIA's TensorFlow programs: the PyTorch program keeps the slots but resets their step, which
# makes the bias correction wrong.
NVLAMB_64K_32K = dataclasses.replace(
    BERT_LARGE_64K_32K,
    name="nvlamb-64k-32k",
    reference="NVIDIA/DeepLearningExamples 729963dd, PyTorch/LanguageModeling/BERT",
    expected="SQuAD v1.1 F1 90.68 ± 0.16 after fine-tuning (10 seeds); 1.2 hours on 256 A100-80G",
    phases=(
        dataclasses.replace(
            BERT_LARGE_64K_32K.phases[0],
            steps=7_038,
            peak_learning_rate=6e-3,
            warmup_steps=2_000,
            power=0.5,
        ),
        dataclasses.replace(
            BERT_LARGE_64K_32K.phases[1],
            steps=1_563,
            predictions=80,
            peak_learning_rate=4e-3,
            warmup_steps=200,
            power=0.5,
            reset_slots=True,
        ),
    ),
    variant="nvlamb",
    global_clipnorm=1.0,
    exclude_from_layer_adaptation=(),
)

# MLPerf starts from its own checkpoint, trained at length 128 (`init_from`), and stops at an
# accuracy, which it looks at every 62 steps. The other entries are in recipes/mlperf.py.
MLPERF_V07 = dataclasses.replace(
    BERT_LARGE_32K,
    name="mlperf-v0.7",
    reference="mlcommons/training_results_v0.7, Google, bert-research-TF-tpu-v3-8192",
    expected="masked-token accuracy 0.712 after about 496 steps, from MLPerf's checkpoint",
    phases=(
        dataclasses.replace(
            BERT_LARGE_32K.phases[1],
            steps=560,
            global_batch_size=8_192,
            peak_learning_rate=0.00288293,
            warmup_steps=287,
            warmup_from=-76,
            examples=None,
        ),
    ),
    beta_1=0.88,
    beta_2=0.88,
    weight_decay=0.0166629,
    global_clipnorm=1.0,
    clip_each_replica=True,
    sum_dtype="bfloat16",
    evaluate_every_examples=62 * 8_192,
    target=0.712,
)

BERT_BASE = dataclasses.replace(
    BERT_LARGE_32K,
    name="bert-base",
    reference="sequences and batch size of arXiv:1810.04805; rate by arXiv:1904.00962v3, Table 5",
    expected="no published figure for LAMB at this size",
    phases=tuple(
        dataclasses.replace(
            phase,
            steps=steps,
            global_batch_size=256,
            peak_learning_rate=5 / (2**3.5 * 10**3),
            examples=None,
        )
        for phase, steps in zip(BERT_LARGE_32K.phases, (900_000, 100_000), strict=True)
    ),
    model="base",
)

BERT_RECIPES = (
    BERT_MINI_DEMO,
    BERT_MINI,
    BERT_BASE,
    *PAPER_COLUMNS,
    BERT_LARGE_64K_32K,
    NVLAMB_64K_32K,
    MLPERF_V07,
)
