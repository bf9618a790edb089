"""Synthetic examples as a source that takes the place of a task's data."""

from inputs.batching import synthetic_batches
from inputs.text.vocabulary import SPECIAL_TOKENS

DESCRIPTION = "synthetic data"
EVALUATION_BATCHES = 2


class SyntheticExamples:
    """Random batches with the element spec of the real ones.

    It has the methods of the real examples: see `inputs.text.examples.Examples`.

    Args:
        element_spec: `(batch size) -> element spec` of the real examples.
        upper_bounds: name of an integer feature -> its values are drawn below this number.
        seed: int.
    """

    def __init__(self, element_spec, upper_bounds: dict[str, int], seed: int):
        self._element_spec = element_spec
        self._upper_bounds = upper_bounds
        self._seed = seed

    def training_batches(self, global_batch_size: int, context=None, first_step: int = 0):
        """Endless batches, one per local replica and step."""
        del first_step  # every batch is drawn alike
        replicas = context.num_replicas_in_sync if context else 1
        spec = self._element_spec(global_batch_size // replicas)
        return synthetic_batches(spec, self._upper_bounds, self._seed)

    def evaluation_batches(self, global_batch_size: int, limit: int | None, context=None):
        """A few batches; `limit` is ignored."""
        del limit
        return self.training_batches(global_batch_size, context).take(EVALUATION_BATCHES)


def synthetic_vocabulary(size: int) -> list[str]:
    """A vocabulary of the special tokens and `word0`, `word1`, ...: `size` pieces in all."""
    return [*SPECIAL_TOKENS, *(f"word{i}" for i in range(size))][:size]
