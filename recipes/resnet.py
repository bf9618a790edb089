"""ResNet's recipes: ImageNet as published, and CIFAR-10 for small machines."""

import dataclasses

from recipes.types import RESNET_EXCLUSIONS, Phase, Recipe, check_least

IMAGENET_IMAGES, CIFAR_IMAGES = 1_281_167, 50_000
AUGMENTATIONS = ("none", "crop", "randaugment")
NORMALIZATIONS = ("imagenet", "mlperf", "cifar10")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """Everything that decides what the training of a classifier computes, apart from its images."""

    task: str = "resnet"
    model: str = "resnet-50"
    exclude_from_weight_decay: tuple[str, ...] = RESNET_EXCLUSIONS
    evaluation_examples: int = 50_000
    image_size: int = 224
    normalization: str = "imagenet"  # or "mlperf": the mean subtracted alone; or "cifar10"
    augmentation: str = "crop"  # random crop and flip; "randaugment" adds to it, "none"
    label_smoothing: float = 0.1
    mixup_alpha: float = 0.0  # of the Beta distribution of the weights; 0 mixes nothing
    batch_norm_momentum: float = 0.9  # arXiv:1706.02677, section 5.1; MLPerf v0.7
    sync_batch_norm: bool = False  # over all replicas; else each normalises by its own batch
    space_to_depth: bool = False  # the same stem, computed in a shape that suits a TPU

    def compiles(self, on_cpu: bool) -> bool:
        """Not where batch norm talks to the other replicas, which it cannot from within; nor on a
        CPU, where XLA's convolutions take several times as long.
        """
        if self.sync_batch_norm or (on_cpu and self.jit_compile is None):
            return False
        return super().compiles(on_cpu)

    def check(self):
        """As `Recipe.check`."""
        super().check()
        check_least(self, image_size=32, mixup_alpha=0)
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
                "sync_batch_norm needs accumulation=1: within a step of several micro-batches "
                f"replicas cannot talk. Received: accumulation={self.accumulation}."
            )
        if self.sync_batch_norm and self.jit_compile:
            raise ValueError(
                "sync_batch_norm needs jit_compile=false or none: from within one XLA program "
                "replicas cannot talk. Received: jit_compile=True."
            )
        if self.space_to_depth and self.image_size % 32:
            raise ValueError(
                "image_size must be a multiple of 32 for the space-to-depth stem. Received: "
                f"image_size={self.image_size}. Take {self.image_size // 32 * 32}, or set "
                "space_to_depth=false."
            )


def _steps(epochs: float, batch: int, images: int = IMAGENET_IMAGES) -> int:
    return round(epochs * images / batch)


def _imagenet(name, batch, epochs, phase, **fields) -> ImageRecipe:
    """A recipe over whole epochs of ImageNet, evaluated every four of them, as in MLPerf."""
    phase = {"steps": _steps(epochs, batch), "global_batch_size": batch} | phase
    return ImageRecipe(
        name=f"resnet50-{name}",
        phases=(Phase(**phase),),
        compute_dtype="bfloat16",
        evaluate_every_steps=_steps(4, batch),
        save_every_steps=_steps(4, batch),
        **fields,
    )


def _column(label, batch, k, top_1, top_5) -> ImageRecipe:
    """A column of the paper's table: rate 4/(2^k · 100), 782 steps of warm-up, η₀(1 - t/T).

    The text gives λ = 0.01 and says nothing of label smoothing.
    """
    return _imagenet(
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
    _column("512", 512, 3.0, ".7696", ".9335"),
    _column("1k", 1_024, 2.5, ".7706", ".9349"),
    _column("2k", 2_048, 2.0, ".7711", ".9353"),
    _column("4k", 4_096, 1.5, ".7692", ".9332"),
    _column("8k", 8_192, 1.0, ".7689", ".9331"),
    _column("16k", 16_384, 0.5, ".7666", ".9322"),
    _column("32k", 32_768, 0.0, ".7642", ".9308"),
)

# What the author's program runs, which is not what the paper's text says: λ = 1.5 for 0.01, no
# bias correction, clipping, label smoothing, a decay that starts at the peak, and the last
# layer's bias decayed and adapted as any weight. It clips each replica's gradient before the
# sum; here the sum is clipped.
LAMB_AUTHOR_32K = _imagenet(
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

# v0.6 has the L2 term in the loss and the decay in the ratio too; here, as in v0.7, all of it is
# LARS's.
LARS_32K = _imagenet(
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
    space_to_depth=True,
)
LARS_65536 = _imagenet(
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
    space_to_depth=True,
)


def _goyal(batch, rate) -> dict:
    """Five epochs of warm-up, then a tenth of the rate more after 30, 60 and 80 of 90 epochs."""
    return {
        "peak_learning_rate": rate,
        "warmup_steps": _steps(5, batch),
        "decay_steps": tuple(_steps(epoch, batch) for epoch in (30, 60, 80)),
    }


# Goyal et al. warm up from 0.1, the rate of batch 256, and not from 0.
MOMENTUM_8K = _imagenet(
    "momentum-8k",
    8_192,
    90,
    _goyal(8_192, 3.2),
    reference="arXiv:1706.02677, sections 2 and 5.1: rate 0.1 x batch / 256",
    expected="ImageNet top-1 .7626 (error 23.74 %)",
    optimizer="momentum",
    weight_decay=1e-4,
    label_smoothing=0.0,
)
ADAMW_16K = _imagenet(
    "adamw-16k",
    16_384,
    90,
    _goyal(16_384, 0.002),
    reference="arXiv:1904.00962v3, Table 4, AdamW+: Goyal's schedule",
    expected="ImageNet top-1 .7307",
    optimizer="adamw",
    weight_decay=1e-5,
    label_smoothing=0.0,
)
ADAGRAD_16K = _imagenet(
    "adagrad-16k",
    16_384,
    90,
    _goyal(16_384, 14.0),
    reference="arXiv:1904.00962v3, Table 4, Adagrad+: Goyal's schedule",
    expected="ImageNet top-1 .7201",
    optimizer="adagrad",
    weight_decay=0.0,
    label_smoothing=0.0,
)

# 220 images of 220 classes learned by heart, each step all of them: that data, labels, network,
# optimizer and export agree. All layers of ResNet-50 at 224, at a quarter of its width.
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


def _cifar(optimizer, batch, rate, **fields) -> ImageRecipe:
    """15 epochs of CIFAR-10, the first tenth of them warm-up, then linear decay to 0."""
    steps = _steps(CIFAR_EPOCHS, batch, CIFAR_IMAGES)
    return ImageRecipe(
        name=f"cifar10-{optimizer}-{batch}",
        reference="this project: a small ResNet for two CPU cores",
        expected="no published figure; see the README",
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


# Peak rates at batch 128 and 4,096; a run of the comparison takes a quarter and four times too.
_CIFAR_RATES = {
    "lars": (2.0, 8.0, {"weight_decay": 5e-4, "epsilon": 0.0}),
    "lamb": (0.005, 0.02, {}),
    "momentum": (0.1, 0.4, {"weight_decay": 5e-4}),
    "adamw": (0.002, 0.008, {}),
}
CIFAR = tuple(
    _cifar(optimizer, batch, rate, **fields)
    for optimizer, (*rates, fields) in _CIFAR_RATES.items()
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
