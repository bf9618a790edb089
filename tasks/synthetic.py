"""Synthetic examples, used in place of a task's data."""

from inputs.batching import synthetic_batches
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS

DESCRIPTION = "synthetic data"
EVALUATION_BATCHES = 2


class SyntheticExamples:
    """Random batches with the element spec of the real ones.

    It has the same methods as the real examples; see `inputs.text.examples.Examples`.

    Args:
        element_spec: `(batch size) -> element spec` of the real examples.
        upper_bounds: name of an integer feature -> exclusive upper bound of its values.
        seed: int.
    """

    def __init__(self, element_spec, upper_bounds: dict[str, int], seed: int):
        self._element_spec = element_spec
        self._upper_bounds = upper_bounds
        self._seed = seed

    def order(self, global_batch_size: int):
        """Returns None: all batches are random alike."""
        del global_batch_size

    def training_batches(self, global_batch_size: int, context=None, first_step: int = 0):
        """Returns an infinite dataset of batches of one replica's size."""
        del first_step  # all batches are random alike
        replicas = context.num_replicas_in_sync if context else 1
        spec = self._element_spec(global_batch_size // replicas)
        return synthetic_batches(spec, self._upper_bounds, self._seed)

    def evaluation_batches(self, global_batch_size: int, limit: int | None, context=None):
        """Returns a dataset of a few batches; ignores `limit`."""
        del limit
        return self.training_batches(global_batch_size, context).take(EVALUATION_BATCHES)


def synthetic_vocabulary(size: int) -> list[str]:
    """Returns `size` word pieces: the special tokens and `word0`, `word1`, ..."""
    return [*SPECIAL_TOKENS, *(f"word{i}" for i in range(size))][:size]
