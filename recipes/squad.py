"""Recipes for SQuAD: fine-tuning a pre-trained BERT to answer questions."""

import dataclasses

from recipes.types import BERT_EXCLUSIONS, Phase, Recipe, check_minimums

SPECIAL_TOKENS = 3  # [CLS], [SEP], [SEP]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquadRecipe(Recipe):
    """All settings of a SQuAD run except its data."""

    task: str = "squad"  # see `Recipe`
    exclude_from_weight_decay: tuple[str, ...] = BERT_EXCLUSIONS  # see `Recipe`
    init_from: str = ""  # folder of a pre-training run, or a checkpoint of tf-models
    # Whether to lower-case the texts and drop their accents. None: as the checkpoint has it.
    lower_case: bool | None = None
    sequence_length: int = 384  # word pieces of question and context together
    max_query_length: int = 64  # longer questions are truncated; in word pieces
    doc_stride: int = 128  # word pieces between the starts of two windows of a context
    max_answer_length: int = 30  # word pieces
    n_best: int = 20  # answers per question in nbest.json
    dropout: float = 0.1  # rate, in all layers
    # Memory: "layer" keeps the inputs of each encoder layer for the backward pass, which computes
    # the rest again; "off" keeps everything.
    remat: str = "off"
    initializer_stddev: float = 0.02  # of the span head

    def check(self):
        """Checks the fields, as `Recipe.check` does."""
        super().check()
        check_minimums(self, max_query_length=1, doc_stride=1, max_answer_length=1, n_best=1)
        check_minimums(self, initializer_stddev=0)
        if self.sequence_length <= self.max_query_length + SPECIAL_TOKENS:
            raise ValueError(
                "sequence_length must leave room for the context after max_query_length word "
                f"pieces and {SPECIAL_TOKENS} special tokens. "
                f"Received: sequence_length={self.sequence_length}, "
                f"max_query_length={self.max_query_length}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1). Received: dropout={self.dropout}.")


# Lengths, stride, n-best size, two epochs, their first tenth as warm-up and the linear decay from
# step 0 are from run_squad.py, optimization.py and the README of google-research/bert. For LAMB, a
# comment in Google's program gives learning rates of 3e-4, 4e-4 and 5e-4 for batch size 64, and
# says that the moments of pre-training are not used. An epoch of SQuAD v1.1 has 88,641 windows at
# these lengths.
SQUAD_LARGE = SquadRecipe(
    name="squad-large",
    reference="arXiv:1904.00962v3, Table 1; google-research/bert, run_squad.py",
    expected="F1 91.475 from the paper's 32K checkpoint, 90.584 from 64K/32K",
    phases=(
        Phase(
            steps=2_770,
            global_batch_size=64,
            peak_learning_rate=4e-4,
            warmup_steps=277,
            decay_from=0,
        ),
    ),
    model="large",
    compute_dtype="bfloat16",
)

SQUAD_BASE = dataclasses.replace(
    SQUAD_LARGE,
    name="squad-base",
    reference="arXiv:1810.04805, Table 2; google-research/bert, run_squad.py",
    expected="no published figure for LAMB",
    model="base",
)

SQUAD_MINI = dataclasses.replace(
    SQUAD_LARGE,
    name="squad-mini",
    reference="this project: for two CPU cores, from what bert-mini trained",
    expected="with model=tiny: exact match 4.8, F1 11.1; see docs/results/squad.md",
    phases=(Phase(steps=2_000, global_batch_size=32, peak_learning_rate=2e-3, warmup_steps=200),),
    model="mini",
    compute_dtype="float32",
    sequence_length=128,
    max_query_length=24,
    doc_stride=64,
    dropout=0.0,
)

SQUAD_RECIPES = (SQUAD_LARGE, SQUAD_BASE, SQUAD_MINI)
