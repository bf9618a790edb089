"""ImageNet with ResNet-50: the lines of the paper's appendix as one table of runs."""

import dataclasses

from experiments.grid import Group, Table

# The learning rates of arXiv:1904.00962v3, appendix D.1.
RATES = (
    *(1e-4, 2e-4, 4e-4, 6e-4, 8e-4, 0.001, 0.002, 0.004, 0.006, 0.008),
    *(0.01, 0.012, 0.014, 0.016, 0.018, 0.02, 0.025, 0.03, 0.04, 0.05),
)
ADAM_RATES = (*RATES[:14], 0.02, 0.04, 0.06, 0.08, 0.1)
ADAGRAD_RATES = (
    *(1e-4, 0.001, 0.002, 0.004, 0.008, 0.01, 0.02, 0.04, 0.08, 0.1, 0.2, 0.4, 0.8),
    *(1.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 30.0, 40.0, 50.0),
)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The lines of one table of the appendix that have the same weight decay.

    Attributes:
        number: The number of the table in version 3.
        optimizer: "adagrad", "adam" or "adamw".
        goyal: Whether the rate follows Goyal et al.: five epochs of warm-up, and a factor of 0.1
            after 30, 60 and 80 epochs.
        weight_decay: λ of AdamW.
        l2: The coefficient of the L2 term of the loss.
        rates: The learning rates.
        top_1: The published top-1 accuracies, separated by blanks, in the order of the rates.
    """

    number: int
    optimizer: str
    goyal: bool
    weight_decay: float
    l2: float
    rates: tuple[float, ...]
    top_1: str

    @property
    def name(self) -> str:
        """The name of its group, such as `table-13` or `table-21-decay-0.001`."""
        alone = sum(grid.number == self.number for grid in GRIDS) == 1
        return f"table-{self.number}" + ("" if alone else f"-decay-{self.weight_decay:g}")


# fmt: off
GRIDS = (
    Grid(9, "adagrad", False, 0, 0, ADAGRAD_RATES,
        ".0027 .0156 .0227 .0309 .0449 .0542 .0759 .1263 .2404 .2736 .4583 .5538 .5410 .5489 "
        ".4768 .5295 .3695 .3108 .3067 .3091 .3228 .0064 .1129 .2160 .0832 .0132 .0010"),
    Grid(10, "adagrad", True, 0, 0, ADAGRAD_RATES,
        ".0011 .0079 .0126 .0190 .0271 .0290 .0421 .0662 .1097 .1343 .2655 .4192 .5520 .5861 "
        ".6725 .7031 .7095 .7138 .7180 .7188 .7201 .7194 .7149 .7129 .7046 .6909 .6798"),
    Grid(11, "adam", False, 0, 0, RATES[:11],
        ".5521 .6089 .6432 .6465 .6479 .6604 .6408 .5687 .5165 .4812 .3673"),
    Grid(12, "adam", True, 0, 0, ADAM_RATES,
        ".4103 .5526 .6455 .6774 .6997 .7101 .7348 .7329 .7265 .7221 .7147 .7082 .6993 .6911 "
        ".6800 .5866 .5109 .4517 .4030"),
    Grid(13, "adamw", False, 1e-5, 0.01, RATES,
        ".5331 .5543 .4877 .4632 .4090 .4240 .3387 .1234 .1229 .0810 .0168 .0327 .0181 .0067 "
        ".0103 .0083 .0089 .0064 .0018 .0035"),
    Grid(14, "adamw", False, 0.0001, 0.01, RATES,
        ".5549 .5651 .4987 .4760 .4469 .4103 .2808 .0811 .0681 .0579 .0522 .0173 .0298 .0165 "
        ".0058 .0102 .0061 .0036 .0011 .0038"),
    Grid(15, "adamw", False, 0.001, 0.01, RATES,
        ".2114 .4289 .1354 .3380 .3261 .2219 .1834 .0826 .0205 .0183 .0075 .0201 .0108 .0021 "
        ".0080 .0059 .0097 .0019 .0039 .0010"),
    Grid(16, "adamw", False, 0.01, 0.01, RATES,
        ".0010 .0010 .0010 .0009 .0022 .0016 .0095 .0034 .0030 .0019 .0091 .0022 .0041 .0017 "
        ".0006 .0022 .0017 .0014 .0020 .0013"),
    Grid(17, "adamw", False, 1e-5, 0, RATES,
        ".4892 .5815 .6346 .6485 .6599 .6663 .6727 .6693 .6573 .6639 .6523 .6506 .6499 .6532 "
        ".6703 .6609 .6543 .6476 .5548 .6187"),
    Grid(18, "adamw", False, 0.0001, 0, RATES,
        ".5033 .5950 .6256 .6545 .6633 .6677 .6724 .6703 .6603 .6643 .6615 .6546 .6551 .6529 "
        ".6565 .6533 .6550 .6455 .6425 .5988"),
    Grid(19, "adamw", False, 0.001, 0, RATES,
        ".4611 .0076 .2923 .5730 .5575 .5989 .5863 .6208 .6150 .4698 .6198 .5424 .5429 .5528 "
        ".5819 .5939 .5411 .4589 .5619 .5279"),
    Grid(20, "adamw", False, 0.01, 0, RATES,
        ".0010 .0009 .0010 .0013 .0169 .0381 .0015 .0014 .0814 .0281 .0118 .0814 .0101 .0042 "
        ".0038 .0027 .0116 .0065 .0164 .0077"),
    Grid(21, "adamw", True, 0.01, 0.01, RATES[:10],
        ".0010 .0010 .0010 .0009 .0010 .0010 .0010 .0010 .0010 .0010"),
    Grid(21, "adamw", True, 0.001, 0.01, RATES[:10],
        ".0010 .0010 .0010 .0010 .0010 .0010 .0010 .0038 .0119 .0061"),
    Grid(22, "adamw", True, 0.0001, 0.01, RATES[:10],
        ".3666 .5316 .6369 .6760 .6956 .7076 .7307 .7281 .7216 .7182"),
    Grid(22, "adamw", True, 1e-5, 0.01, RATES[:10],
        ".4980 .6287 .6774 .6735 .6622 .6469 .5847 .4869 .3497 .3119"),
    Grid(23, "adamw", True, 0.01, 0, RATES[:10],
        ".0010 .0010 .0010 .0010 .0010 .0010 .0010 .0010 .0010 .0010"),
    Grid(23, "adamw", True, 0.001, 0, RATES[:10],
        ".0010 .0010 .0010 .0010 .0010 .0010 .0011 .0017 .0197 .1330"),
    Grid(24, "adamw", True, 0.0001, 0, RATES,
        ".2852 .4406 .5682 .6235 .6531 .6696 .7005 .7170 .7202 .7224 .7202 .7206 .7189 .7170 "
        ".7154 .7136 .7145 .7114 .7066 .7028"),
    Grid(25, "adamw", True, 1e-5, 0, RATES,
        ".3125 .4535 .5777 .6278 .6532 .6682 .6994 .7096 .7106 .7086 .7094 .7072 .7109 .7058 "
        ".7052 .7064 .7035 .6995 .6973 .6971"),
)
# fmt: on
# Peak learning rate of Table 6, 4 / (2^k · 100), and the published top-1 accuracy, by batch size.
LAMB = {
    "512": (0.005, 0.7696),
    "1k": (0.00707107, 0.7706),
    "2k": (0.01, 0.7711),
    "4k": (0.0141421, 0.7692),
    "8k": (0.02, 0.7689),
    "16k": (0.0282843, 0.7666),
    "32k": (0.04, 0.7642),
}
CONSTANT = {"warmup_steps": 0, "decay_steps": ""}


def _settings(recipe, fields, rates) -> dict:
    return {
        "recipe": recipe,
        "flags": {},
        "set": fields,
        "rates": dict.fromkeys(rates, 1.0),
        "curve": ["image_loss"],
        "evaluations": ["image_loss", "image_top1", "image_top5"],
    }


def _grid_group(grid: Grid) -> Group:
    recipe = "resnet50-adagrad-16k" if grid.optimizer == "adagrad" else "resnet50-adamw-16k"
    fields = {"weight_decay": grid.weight_decay, "l2_regularization": grid.l2}
    rates = ["peak_learning_rate"]
    if not grid.goyal:
        fields |= CONSTANT
        rates.append("end_learning_rate")
    values = map(float, grid.top_1.split())
    return Group(
        grid.name,
        _settings(recipe, fields, rates),
        grid.rates,
        seeds=(1,),
        extended=False,
        published=dict(zip(grid.rates, values, strict=True)),
        chip_hours_of=recipe,
    )


def _lamb_group(label: str) -> Group:
    rate, top_1 = LAMB[label]
    return Group(
        f"table-6-lamb-{label}",
        _settings(f"resnet50-lamb-{label}", {}, ["peak_learning_rate"]),
        (rate,),
        seeds=(1,),
        extended=False,
        published={rate: top_1},
        # Each core has 16 images at every batch size, so the chip-hours are those of 32K.
        chip_hours_of="resnet50-lamb-32k",
    )


def imagenet_table() -> Table:
    """Returns the table of the appendix' grids and of LAMB, untuned, at seven batch sizes."""
    groups = (*map(_lamb_group, LAMB), *map(_grid_group, GRIDS))
    return Table(
        "imagenet",
        "ImageNet and ResNet-50, the paper's tuning grids",
        "train",
        "image_top1",
        groups,
        one_core=False,
        published={group.name: max(group.published.values()) for group in groups},
        text="""\
Every line of Tables 9 to 25 of the appendix of the [paper](https://arxiv.org/abs/1904.00962)
(version 3), and of its Table 6: ResNet-50 on ImageNet for 90 epochs, Adagrad, Adam and AdamW at
batch 16,384 and LAMB, untuned, at 512 to 32,768. A line is a run of `train.py`. The chip-hours of
each are those of the [pre-flight](preflight.md), a lower bound; `--list` prints them, too. `--cell`
runs one line, and `--groups` one or more of the groups below. `DATA` is the folder that `python -m
inputs.images.prepare` wrote, and `--train_flag=--tpu=NAME` names the TPU:

```bash
python -m experiments imagenet --list
python -m experiments imagenet --groups=table-13 --data_dir=DATA --train_flag=--tpu=NAME
python -m experiments imagenet --cell=table-22-decay-0.0001-rate0.002-seed1 --data_dir=DATA \\
    --train_flag=--tpu=NAME
```

| group | optimizer | schedule | λ | L2 |
|---|---|---|---|---|
"""
        + "\n".join(map(_row, GRIDS))
        + """

The paper does not specify the following, and these commands use: a constant rate without warm-up in
the "default" tables; ε = 1e-6, the paper's default; β = 0.9 and 0.999; and as the L2 term L2 ·
½‖x‖² over the weights that are decayed (no bias, no batch normalization), added to the loss. Adam
is AdamW with λ = 0. There is no label smoothing in Tables 9 to 25; for Table 6 see its
[recipes](../commands/recipes.md).""",
    )


def _row(grid: Grid) -> str:
    schedule = "Goyal et al." if grid.goyal else "constant"
    decay = f"{grid.weight_decay:g}" if grid.optimizer == "adamw" else ""
    return f"| {grid.name} | {grid.optimizer} | {schedule} | {decay} | {grid.l2 or 'off'} |"
