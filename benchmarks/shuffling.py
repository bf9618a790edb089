"""How well the order of examples shuffles: python -m benchmarks.shuffling

Compares one epoch in the order of `inputs.order` with true random permutations, in two figures:

- neighbors: the mean number of pairs in a batch that are at most `--distance` examples apart in the
  data set, and so are likely to be from one document or class;
- drift: the correlation between the step of an example and its position in the data set.

Each lane supplies its own share of a batch. A batch therefore has fewer neighbors than a random
permutation, unless there are few lanes.
"""

import argparse

from inputs import process  # isort: split

import numpy as np
import tensorflow as tf

from inputs.errors import InputError, refuse_below
from inputs.order import Order, number_of_lanes, row_batches

PERMUTATIONS = 5


def epoch(order: Order) -> np.ndarray:
    """[steps, batch] numbers of the examples of the first epoch, without the last partial batch."""
    rows = row_batches(order, None, 0, lambda examples, ids: examples[:, tf.newaxis])
    steps = order.examples // order.batch
    return np.stack([batch[:, 0] for batch in rows.take(steps).as_numpy_iterator()])


def neighbors(batches: np.ndarray, distance: int) -> float:
    """The mean number of pairs in a batch that are at most `distance` apart."""
    total = 0
    for batch in batches:
        places = np.sort(batch)
        total += (np.searchsorted(places, places + distance, "right") - 1).sum()
        total -= np.arange(len(places)).sum()
    return total / len(batches)


def drift(batches: np.ndarray) -> float:
    """The correlation between an example's step and its place."""
    steps = np.repeat(np.arange(len(batches)), batches.shape[1])
    return float(np.corrcoef(steps, batches.ravel())[0, 1])


def parse_batches(text: str, examples: int) -> list[int]:
    """Reads `--batches`.

    Raises:
        InputError: the text is something else, or the epoch of a batch size has less than two
            steps, so that there is no drift.
    """
    try:
        batches = [int(size) for size in text.split(",")]
    except ValueError:
        raise InputError(
            f"--batches={text}: give batch sizes separated by commas, such as 64,4096."
        ) from None
    refuse_below(1, batches=min(batches))
    if examples < 2 * max(batches):
        raise InputError(
            f"--batches={text}: an epoch of --examples={examples} has less than two steps of "
            f"{max(batches)}. Give at least {2 * max(batches)} examples, or smaller batches."
        )
    return batches


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shuffling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--examples", type=int, default=500_000, help="number of examples in the data set"
    )
    parser.add_argument("--batches", default="64,4096,32768", help="batch sizes, comma-separated")
    parser.add_argument("--block", type=int, default=256, help="examples per block")
    parser.add_argument("--window", type=int, default=8, help="blocks whose examples are mixed")
    parser.add_argument(
        "--distance",
        type=int,
        default=256,
        help="largest distance of two neighbors in the data set",
    )
    flags = parser.parse_args()
    refuse_below(
        1,
        examples=flags.examples,
        block=flags.block,
        window=flags.window,
        distance=flags.distance,
    )
    batches = parse_batches(flags.batches, flags.examples)
    print(f"{'batch':>8}{'lanes':>7}   neighbors: order, permutation   drift: order, permutation")
    rng = np.random.default_rng(0)
    for batch in batches:
        lanes = number_of_lanes(batch, flags.examples)
        order = Order(flags.examples, batch, lanes, flags.block, flags.window, seed=1)
        ours = epoch(order)
        shuffled = [
            rng.permutation(flags.examples)[: ours.size].reshape(ours.shape)
            for _ in range(PERMUTATIONS)
        ]
        chance = np.mean([neighbors(one, flags.distance) for one in shuffled])
        most = max(abs(drift(one)) for one in shuffled)
        print(
            f"{batch:8,}{lanes:7}  {neighbors(ours, flags.distance):17.2f}, {chance:11.2f}   "
            f"{drift(ours):12.4f}, up to {most:.4f}"
        )


if __name__ == "__main__":
    process.run(main)
