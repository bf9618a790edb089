"""Writes the summary of all tables from their run files: docs/results/summary.md."""

import os
from collections.abc import Iterable

from experiments.grid import Table, progress
from experiments.page import (
    best_values,
    differences,
    format_mean,
    format_p,
    format_value,
    group_label,
)
from experiments.runner import State, metrics, state
from inputs.storage.files import atomic_write

SIGNIFICANT = 0.05  # of the p of Welch's test

HEAD = """\
# What large-batch training gives you, measured here

The [paper](https://arxiv.org/abs/1904.00962) claims that a larger batch reaches the same accuracy
in the same number of epochs without retuning. [Nado et al.](https://arxiv.org/abs/2102.06356) claim
that a tuned Nesterov or Adam does as well. This page compares both claims with what was measured on
two CPU cores, and in fifteen minutes each on an H100 and an H200 that up to fourteen runs shared.
If a table tunes, it tunes every optimizer by the same rule; the table's page states the rule and
what was not tuned. The differences and the lists of runs are written from the run files by
`python -m experiments summary`.

**In short, up to November 2026:**

- **On MNIST, LAMB's mean test error grows the least with the batch** ([picture](mnist-batches.md)).
  Tuned at batch 1,024, then with its learning rate only rescaled (by the square root of the
  factor), its test error is 0.88 % at 1,024, 0.89 % at 4,096, 1.12 % at 16,384 (110 steps) and
  7.2 % at 60,000 (30 steps). At each of these sizes this rate also beats the rates 3.2 times lower
  and higher (first seed). AdamW, tuned at each size, has 0.85 %, 1.14 %, 2.8 % and 8.8 %; momentum
  has 1.5 %, 2.8 %, 6.4 % and 45 %; Nesterov has 1.2 %, 2.7 %, 7.6 % and 42 %. These are means of
  three seeds. Once p is corrected for the number of tests, none of the differences between LAMB
  and another optimizer is significant.
- **LARS's mean falls behind LAMB's on MNIST as the batch grows.** Tuned at each size, its error is
  1.2 % at 1,024, 1.9 % at 4,096, 15 % at 16,384 and 33 % at 60,000. It is ahead of momentum and
  Nesterov at 4,096 and 60,000, and behind both at 16,384.
- **At the usual batch sizes LAMB and AdamW tie**: MNIST at 256 and 1,024 (Table 8 of the paper has
  LAMB first), also with the network and rates of the paper's author (LAMB 0.9939, published 0.9945;
  AdamW 0.9942, published 0.9941; momentum 0.9919, behind LAMB), and DavidNet on CIFAR-10 at 512
  (LAMB has the highest mean, as in Table 7, by less than the spread of the seeds).
- **On CIFAR-10, LAMB's mean is half a point lower at batch 2,048 than at 512**, without retuning:
  0.9274 and 0.9329 (corrected p 0.064). The best of four rates at 2,048 gives 0.9284 (three seeds).
  The other optimizers are not finished there.
- **BERT-tiny with LAMB loses masked accuracy from batch 8 to 256, near its noise scale**, over the
  same 256,000 sequences: 0.3089 and 0.2834 (corrected p 0.037). AdamW has 0.2891 ± 0.0163 at 8,
  where its best rate varies most with the seed, and 0.2755 at 256. The two tie at both sizes. The
  paper's rule, the square root of the factor, leads from LAMB's best rate at 8 to its best at 256.
- **Not decided**: CIFAR-10 at 8,192, longer runs of BERT, ImageNet.

![test error over the batch size on MNIST](mnist-batches/sweep.png)

Only the learning rate is tuned. Warm-up is the same for all optimizers of a table. In the sweep of
MNIST it follows the paper's rule for LAMB, the same number of steps at each batch size; DavidNet
has 6 epochs at each. On CIFAR-10, LAMB's λ is its author's best. These runs do not include a
Nesterov with tuned warm-up, momentum and decay, as in Nado et al.

## Earlier comparisons, with too few steps at the large batch to decide

- [BERT-tiny](bert-batches.md), masked-token accuracy, three seeds. Batch 2: LAMB 0.1258 ± 0.0008,
  AdamW 0.1241 ± 0.0003 (corrected p 0.099). Batch 64, 440 steps: LAMB 0.0952 ± 0.0012, AdamW
  0.1070 ± 0.0082 (corrected p 0.127). Both are ties; LAMB is the steadier at 64.
- [CIFAR-10](cifar10-recipes.md), top-1, means of two seeds. Batch 128: LAMB 0.772, LARS 0.770,
  momentum 0.769, AdamW 0.744. Batch 4,096, 49 steps: AdamW 0.458, LAMB 0.442, momentum 0.368, LARS
  0.301; only the best rate of LARS is inside its grid.

In both, every optimizer loses much at the large batch. The paper's claim is about thousands of
steps, so these runs neither support it nor refute it.
"""


def write_summary(tables: Iterable[Table], results: str, path: str) -> None:
    """Writes the summary.

    Args:
        tables: the tables.
        results: the folder with one folder of run files for each table.
        path: the Markdown file; an existing file is replaced.

    Raises:
        InputError: a run file cannot be used; see `experiments.runner.load_runs`.
    """
    compared = [table for table in tables if table.pairs or table.published]
    states = [(table, state(table, os.path.join(results, table.name))) for table in compared]
    pages = {table.name: _page(table, results) for table, _ in states}
    parts = [HEAD, "## Differences"]
    rows = [row for table, now in states for row in _differences(table, now, pages)]
    parts.append(
        "Welch's test, two-sided, and its p corrected by Holm's method for the number of tests of "
        f"the\ntable. With a corrected p below {SIGNIFICANT} the first of the two wins or loses; "
        "otherwise they tie, which\nonly means that these seeds show no significant difference."
    )
    head = [
        "| | first | second | difference | p | corrected | the first |",
        "|---|---|---|---|---|---|---|",
    ]
    parts.append("\n".join([*head, *rows]) if rows else "No pair has two seeds of each yet.")
    so_far = [row for table, now in states for row in _single(table, now, pages)]
    if so_far:
        parts.append("## Runs that are not in a test")
        parts.append(
            "These groups are not finished, none of their rates learns, their runs are those of "
            "another group, or no test is planned for them."
        )
        parts.append("\n".join(["| | group | runs |", "|---|---|---|", *so_far]))
    parts += ["## Not run", "\n".join(_not_run(table, now, pages) for table, now in states)]
    with atomic_write(path) as file:
        file.write("\n\n".join(part.strip("\n") for part in parts) + "\n")


def _page(table, results):
    """The title of a table, with a link to its page if there is one."""
    known = os.path.exists(os.path.join(results, f"{table.name}.md"))
    return f"[{table.title}]({table.name}.md)" if known else table.title


def _differences(table, now, pages):
    seeds = best_values(table, now)
    for one in differences(table, now):
        verdict = "ties" if one.corrected >= SIGNIFICANT else "wins" if one.mean > 0 else "loses"
        cells = [pages[table.name]]
        for name in (one.first, one.second):
            cells.append(f"{group_label(table.group(name))}: {format_mean(seeds[name])}")
        cells += [f"{one.mean:+.4f}", format_p(one.p), format_p(one.corrected), verdict]
        yield f"| {' | '.join(cells)} |"


def _single(table, now, pages):
    """Rows of the groups that have runs and are in no difference."""
    values = metrics(table, now.runs)
    compared = {name for one in differences(table, now) for name in (one.first, one.second)}
    for group in table.groups:
        own = {n: v for n, v in values.items() if n.rpartition("-rate")[0] == group.name}
        if own and group.name not in compared:
            runs = [
                f"{name.rpartition('-rate')[2].replace('-seed', ', seed ')}: {format_value(found)}"
                for name, found in sorted(own.items(), key=_rate_and_seed)
            ]
            yield f"| {pages[table.name]} | {group_label(group)} | {'; '.join(runs)} |"


def _rate_and_seed(run):
    rate, _, seed = run[0].rpartition("-rate")[2].partition("-seed")
    return float(rate), int(seed)


def _not_run(table, now: State, pages) -> str:
    if not now.todo and not now.later:
        return f"- {pages[table.name]}: finished."
    values = metrics(table, now.runs)
    left = [
        group_label(group)
        for group in table.groups
        if (own := progress(table, group, values)).todo or own.later
    ]
    count = len(now.todo) + now.later
    if not now.runs:
        return (
            f"- {pages[table.name]}: no run yet; at least {count} are to be run (`{table.name}`)."
        )
    more = "1 more run" if count == 1 else f"{count} more runs"
    return f"- {pages[table.name]}: at least {more}, of {', '.join(left)} (`{table.name}`)."
