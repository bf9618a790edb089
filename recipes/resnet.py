"""Recipes for ResNet: ImageNet as published, and CIFAR-10 for small machines."""

import dataclasses

from recipes.types import RESNET_EXCLUSIONS, Phase, Recipe, check_minimums

IMAGENET_IMAGES = 1_281_167
CIFAR_IMAGES = 50_000
AUGMENTATIONS = ("none", "crop", "randaugment")
NORMALIZATIONS = ("imagenet", "mlperf", "cifar10")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """All settings of the training of an image classifier except its images."""

    task: str = "resnet"  # see `Recipe`
    model: str = "resnet-50"  # a size that the task defines
    exclude_from_weight_decay: tuple[str, ...] = RESNET_EXCLUSIONS  # see `Recipe`
    evaluation_examples: int = 50_000  # see `Recipe`
    image_size: int = 224  # side in pixels
    normalization: str = "imagenet"  # or "mlperf", which only subtracts the mean; or "cifar10"
    augmentation: str = "crop"  # random crop and flip; "randaugment": the same and more; "none"
    label_smoothing: float = 0.1  # share of the uniform distribution in the labels
    mixup_alpha: float = 0.0  # of the Beta distribution of the mixing weights; 0: no mixup
    # Weight of the old value in the moving averages (arXiv:1706.02677, section 5.1; MLPerf v0.7).
    batch_norm_momentum: float = 0.9
    sync_batch_norm: bool = False  # statistics over all replicas instead of each replica's batch
    space_to_depth: bool = False  # compute the stem in a shape that is faster on a TPU

    def compiles(self, on_cpu: bool) -> bool:
        """Returns whether to compile the forward and backward pass with XLA.

        Not with synchronized batch normalization, because an XLA program cannot communicate with
        other replicas. By default not on a CPU, where convolutions take several times as long with
        XLA.

        Args:
            on_cpu: Boolean. Whether the run uses CPUs.
        """
        if self.sync_batch_norm or (on_cpu and self.jit_compile is None):
            return False
        return super().compiles(on_cpu)

    def check(self):
        """Checks the fields, as `Recipe.check` does."""
        super().check()
        check_minimums(self, image_size=32, mixup_alpha=0)
        for name, choices in (
            ("augmentation", AUGMENTATIONS),
            ("normalization", NORMALIZATIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}. "
                    f"Received: {name}={getattr(self, name)}."
                )
        for name in ("label_smoothing", "batch_norm_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must lie in [0, 1). Received: {name}={getattr(self, name)}."
                )
        if self.sync_batch_norm and self.accumulation > 1:
            raise ValueError(
                "sync_batch_norm needs accumulation=1, because replicas cannot communicate within "
                "a step of several micro-batches. "
                f"Received: accumulation={self.accumulation}."
            )
        if self.sync_batch_norm and self.jit_compile:
            raise ValueError(
                "sync_batch_norm needs jit_compile=false or none, because replicas cannot "
                "communicate within an XLA program. Received: jit_compile=True."
            )
        if self.space_to_depth and self.image_size % 32:
            raise ValueError(
                "image_size must be a multiple of 32 for the space-to-depth stem. Received: "
                f"image_size={self.image_size}. Use {self.image_size // 32 * 32}, or set "
                "space_to_depth=false."
            )


def _steps(epochs: float, batch: int, images: int = IMAGENET_IMAGES) -> int:
    """Returns the number of steps in `epochs` epochs."""
    return round(epochs * images / batch)


def _imagenet_recipe(name, batch, epochs, phase, **fields) -> ImageRecipe:
    """Returns a recipe for ImageNet with an evaluation every four epochs, as in MLPerf.

    Args:
        name: String. The end of the recipe's name.
        batch: Integer. The global batch size.
        epochs: Integer. The number of epochs, from which `steps` is computed unless `phase` has it.
        phase: Dictionary. Arguments of the only `Phase`.
        **fields: Arguments of `ImageRecipe`.
    """
    phase = {"steps": _steps(epochs, batch), "global_batch_size": batch} | phase
    return ImageRecipe(
        name=f"resnet50-{name}",
        phases=(Phase(**phase),),
        compute_dtype="bfloat16",
        evaluate_every_steps=_steps(4, batch),
        save_every_steps=_steps(4, batch),
        **fields,
    )


def _paper_column(label, batch, k, top_1, top_5) -> ImageRecipe:
    """Returns the recipe of a column of the paper's table.

    The learning rate is 4/(2^k · 100), with 782 steps of warm-up and the decay η₀(1 - t/T). The
    text gives λ = 0.01. It does not mention label smoothing, which is 0.1 here, as in the author's
    program.
    """
    return _imagenet_recipe(
        f"lamb-{label}",
        batch,
        90,
        {
            "peak_learning_rate": 4 / (2**k * 100),
            "warmup_steps": 782,
            "decay_from": 0,
            "examples": 90 * IMAGENET_IMAGES,
        },
        reference=f"arXiv:1904.00962v3, Table 6 (column {label.upper()}), untuned LAMB",
        expected=f"ImageNet top-1 {top_1}, top-5 {top_5}",
    )


LAMB_COLUMNS = (
    _paper_column("512", 512, 3.0, ".7696", ".9335"),
    _paper_column("1k", 1_024, 2.5, ".7706", ".9349"),
    _paper_column("2k", 2_048, 2.0, ".7711", ".9353"),
    _paper_column("4k", 4_096, 1.5, ".7692", ".9332"),
    _paper_column("8k", 8_192, 1.0, ".7689", ".9331"),
    _paper_column("16k", 16_384, 0.5, ".7666", ".9322"),
    _paper_column("32k", 32_768, 0.0, ".7642", ".9308"),
)

# The settings of the author's program. They differ from the text of the paper: λ is 1.5 instead of
# 0.01, there is no bias correction, there are clipping and label smoothing, the decay starts at the
# peak, and the bias of the last layer is decayed and adapted. The program clips the gradient of
# each replica before the sum. This project clips the sum.
LAMB_AUTHOR_32K = _imagenet_recipe(
    "lamb-author-32k",
    32_768,
    90,
    {"peak_learning_rate": 0.04, "warmup_steps": 782},
    reference="github.com/fastalgo/imagenet_resnet50_lamb, the paper's author",
    expected="ImageNet top-1 .76337, top-5 .93018 (its log; v3-256)",
    variant="paper-v3",
    weight_decay=1.5,
    global_clipnorm=1.0,
    exclude_from_weight_decay=("(^|/)(gamma|beta)$",),
)

# MLPerf v0.6 has an L2 term in the loss, and weight decay in the trust ratio as well. Here, as in
# v0.7, LARS applies the weight decay.
LARS_32K = _imagenet_recipe(
    "lars-32k",
    32_768,
    90,
    {
        "steps": 2_983,
        "peak_learning_rate": 31.2,
        "warmup_steps": _steps(25, 32_768),
        "end_learning_rate": 1e-4,
        "power": 2.0,
    },
    reference="mlcommons/training_results_v0.6, Google, resnet, tpu-v3-2048",
    expected="ImageNet top-1 .759, MLPerf's target, in 1.282 minutes on v3-2048",
    optimizer="lars",
    weight_decay=1e-4,
    epsilon=1e-5,
    normalization="mlperf",
    target=0.759,
    space_to_depth=True,
)
LARS_65536 = _imagenet_recipe(
    "lars-65536",
    65_536,
    88,
    {
        "steps": 1_738,
        "peak_learning_rate": 24.699,
        "warmup_steps": _steps(31, 65_536),
        "end_learning_rate": 1e-4,
        "power": 2.0,
    },
    reference="mlcommons/training_results_v0.7, Google, resnet-research-TF-tpu-v3-8192",
    expected="ImageNet top-1 .759, MLPerf's target, in 0.481 minutes on v3-8192",
    optimizer="lars",
    momentum=0.951807,
    weight_decay=1e-4,
    epsilon=0.0,
    normalization="mlperf",
    target=0.759,
    space_to_depth=True,
)


def _goyal_schedule(batch, rate) -> dict:
    """Returns arguments of a `Phase` with the schedule of Goyal et al.

    Five epochs of warm-up, then a factor of 0.1 after each of 30, 60 and 80 epochs.
    """
    return {
        "peak_learning_rate": rate,
        "warmup_steps": _steps(5, batch),
        "decay_steps": tuple(_steps(epoch, batch) for epoch in (30, 60, 80)),
    }


# Goyal et al. warm up from 0.1, the learning rate for batch size 256, instead of 0.
MOMENTUM_8K = _imagenet_recipe(
    "momentum-8k",
    8_192,
    90,
    _goyal_schedule(8_192, 3.2),
    reference="arXiv:1706.02677, sections 2 and 5.1: rate 0.1 x batch / 256",
    expected="ImageNet top-1 .7626 (error 23.74 %)",
    optimizer="momentum",
    weight_decay=1e-4,
    label_smoothing=0.0,
)
ADAMW_16K = _imagenet_recipe(
    "adamw-16k",
    16_384,
    90,
    _goyal_schedule(16_384, 0.002),
    reference="arXiv:1904.00962v3, Table 4, AdamW+: the best line of Table 22",
    expected="ImageNet top-1 .7307",
    optimizer="adamw",
    weight_decay=1e-4,
    l2_regularization=0.01,
    label_smoothing=0.0,
)
ADAGRAD_16K = _imagenet_recipe(
    "adagrad-16k",
    16_384,
    90,
    _goyal_schedule(16_384, 14.0),
    reference="arXiv:1904.00962v3, Table 4, Adagrad+: Goyal's schedule",
    expected="ImageNet top-1 .7201",
    optimizer="adagrad",
    weight_decay=0.0,
    label_smoothing=0.0,
)

# Overfits 220 images of 220 classes, all of them in each step, which shows that data, labels,
# network, optimizer and export fit together. The network has all layers of ResNet-50 and images of
# size 224, at a quarter of the width.
ONE_BATCH = ImageRecipe(
    name="resnet50-one-batch",
    reference="this project: a proof for two CPU cores",
    expected="top-1 1.0 and loss below 0.1 in training, top-1 above 0.95 in evaluation",
    phases=(Phase(steps=150, global_batch_size=220, peak_learning_rate=0.03, warmup_steps=8),),
    model="resnet-50-narrow",
    accumulation=5,  # the activations of 44 images at a time
    augmentation="none",
    label_smoothing=0.0,
    save_every_steps=20,
)

CIFAR_EPOCHS = 15


def _cifar_recipe(optimizer, batch, rate, **fields) -> ImageRecipe:
    """Returns a recipe of 15 epochs of CIFAR-10: warm-up for a tenth, then linear decay to 0."""
    steps = _steps(CIFAR_EPOCHS, batch, CIFAR_IMAGES)
    return ImageRecipe(
        name=f"cifar10-{optimizer}-{batch}",
        reference="this project: a small ResNet for two CPU cores",
        expected="no published figure; see docs/results/cifar10-recipes.md",
        phases=(
            Phase(
                steps=steps,
                global_batch_size=batch,
                peak_learning_rate=rate,
                warmup_steps=steps // 10,
            ),
        ),
        model="cifar-resnet-10",
        image_size=32,
        normalization="cifar10",
        evaluation_examples=10_000,
        evaluate_every_steps=_steps(3, batch, CIFAR_IMAGES),
        save_every_steps=_steps(1, batch, CIFAR_IMAGES),
        optimizer=optimizer,
        **fields,
    )


# Optimizer: peak learning rates for batch sizes 128 and 4,096, and other fields. The comparison in
# experiments/ also tries a quarter and four times these rates.
_CIFAR_OPTIMIZERS = {
    "lars": (2.0, 8.0, {"weight_decay": 5e-4, "epsilon": 0.0}),
    "lamb": (0.005, 0.02, {}),
    "momentum": (0.1, 0.4, {"weight_decay": 5e-4}),
    "adamw": (0.002, 0.008, {}),
}
CIFAR = tuple(
    _cifar_recipe(optimizer, batch, rate, **fields)
    for optimizer, (*rates, fields) in _CIFAR_OPTIMIZERS.items()
    for batch, rate in zip((128, 4_096), rates, strict=True)
)

RESNET_RECIPES = (
    *LAMB_COLUMNS,
    LAMB_AUTHOR_32K,
    LARS_32K,
    LARS_65536,
    MOMENTUM_8K,
    ADAMW_16K,
    ADAGRAD_16K,
    ONE_BATCH,
    *CIFAR,
)
