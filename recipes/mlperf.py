"""MLPerf Training's BERT and ResNet-50: the best run of each round, and the reference runs.

The figures were read from the logs that the sources name: the result logs of a round, and, where a
log lacks a setting or has a wrong one, the submitter's script beside it. The reference runs are
those of the convergence points against which MLPerf's rules compare a submission.

What differs from the originals: one replica's gradients are those of one chip or core here, while
some of the GPU runs clip and sum buckets of gradients in float16; NVIDIA's ResNet-50 normalizes
batches over groups of two GPUs, here each replica on its own (or all, with `sync_batch_norm`); and
NVIDIA's log of rounds 1.1 and 2.1 has the optimizer's default weight decay, 0, while the scripts
set 0.0166629. BERT starts from MLPerf's checkpoint: see `init_from`.
"""

import dataclasses

from recipes.bert import MLPERF_V07, BertRecipe, TextPhase
from recipes.resnet import IMAGENET_IMAGES, LARS_32K, ImageRecipe
from recipes.types import Phase, Recipe

BERT_TARGET = 0.72  # masked-token accuracy, from round 1.0 on
RESNET_TARGET = 0.759  # top-1
REFERENCE_COMMIT = "mlcommons/logging 7bbf7926, mlperf_logging/rcp_checker"


def bert_evaluation_examples(batch: int) -> int:
    """Returns the sequences between two evaluations in MLPerf's rules for BERT.

    Source: mlcommons/training, retired_benchmarks/bert/README.md, "Stopping criteria".
    """
    return int(0.05 * (230.23 * batch + 3_000_000) / 25_000) * 25_000


@dataclasses.dataclass(frozen=True)
class Result:
    """A published result of a round.

    Attributes:
        recipe: The `Recipe`.
        round: The round of MLPerf Training, such as "2.0".
        system: The submitter and the chips.
        minutes: The score: the mean time from run_start to run_stop, without best and worst run.
        source: Repository, commit and folder of the logs.
        examples: The mean number of examples to the target, over the runs; None if it was not read.
        topology: The slice of TPUs as `--preflight` takes it, or "" if there is none that the batch
            divides by, as for GPUs.
    """

    recipe: Recipe
    round: str
    system: str
    minutes: float
    source: str
    examples: float | None
    topology: str = ""


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference convergence point: how many examples a batch size needs to the target.

    Attributes:
        recipe: The `Recipe` of the runs.
        examples: Mean number of examples to the target, over the runs.
        deviation: Standard deviation of that number among the runs.
        runs: Number of runs.
        source: Repository, commit, file and key.
    """

    recipe: Recipe
    examples: float
    deviation: float
    runs: int
    source: str

    @property
    def batch(self) -> int:
        """Examples per step."""
        return self.recipe.phases[0].global_batch_size


def _bert(name, batch, rate, betas, decay, warmup, steps, *, reference, expected, **fields):
    """Returns a recipe for BERT-Large at length 512 from MLPerf's checkpoint.

    Args:
        name: String. The end of the recipe's name.
        batch: Integer. The global batch size.
        rate: Float. The peak learning rate.
        betas: Pair of floats. The decay of the moments.
        decay: Float. The weight decay.
        warmup: Pair of integers. The number of warm-up steps, and the step from which they are
            counted. A warm-up that ends before step 0 is none.
        steps: Integer. The steps of the decay, η₀(1 - t/T).
        reference: String. The source.
        expected: String. The result.
        **fields: Other fields of the recipe.
    """
    warmup_steps, warmup_from = warmup if sum(warmup) > 0 else (0, 0)
    return BertRecipe(
        name=f"mlperf-bert-{name}",
        reference=reference,
        expected=expected,
        phases=(
            TextPhase(
                steps=steps,
                global_batch_size=batch,
                peak_learning_rate=rate,
                warmup_steps=warmup_steps,
                warmup_from=warmup_from,
                decay_from=0,
                sequence_length=512,
                predictions=76,
            ),
        ),
        model="large",
        compute_dtype="bfloat16",
        beta_1=betas[0],
        beta_2=betas[1],
        epsilon=1e-6,
        weight_decay=decay,
        global_clipnorm=1.0,
        evaluate_every_examples=bert_evaluation_examples(batch),
        target=BERT_TARGET,
        **fields,
    )


def _resnet(name, batch, rate, warmup_epochs, momentum, decay, steps, *, reference, expected, tpu):
    """Returns a recipe for ResNet-50 with LARS.

    Args:
        name: String. The end of the recipe's name.
        batch: Integer. The global batch size.
        rate: Float. The peak learning rate.
        warmup_epochs: Integer. Epochs of linear warm-up.
        momentum: Float.
        decay: Float. The weight decay.
        steps: Integer. The steps of the run, with warm-up. The rate falls to 1e-4 with power 2.
        reference: String. The source.
        expected: String. The result.
        tpu: Boolean. Whether the run used TPUs, which subtract the mean of the pixels only.
    """
    return ImageRecipe(
        name=f"mlperf-resnet50-{name}",
        reference=reference,
        expected=expected,
        phases=(
            Phase(
                steps=steps,
                global_batch_size=batch,
                peak_learning_rate=rate,
                warmup_steps=warmup_epochs * IMAGENET_IMAGES // batch,
                end_learning_rate=1e-4,
                power=2.0,
            ),
        ),
        compute_dtype="bfloat16",
        optimizer="lars",
        momentum=momentum,
        weight_decay=decay,
        epsilon=0.0,
        label_smoothing=0.1,
        normalization="mlperf" if tpu else "imagenet",
        space_to_depth=tpu,
        evaluate_every_examples=4 * IMAGENET_IMAGES,
        save_every_steps=max(1, round(4 * IMAGENET_IMAGES / batch)),
        target=RESNET_TARGET,
    )


def _logs(round_, commit, folder):
    return f"mlcommons/training_results_v{round_} {commit}, {folder}"


def _bert_result(name, round_, system, minutes, examples, commit, folder, *settings, **fields):
    """Returns a `Result` of BERT. `examples` is the mean number of sequences to the target."""
    topology = fields.pop("topology", "")
    source = _logs(round_, commit, folder)
    expected = (
        f"masked-token accuracy {BERT_TARGET:.3f} after {examples / 1e6:.2f} million sequences on "
        f"average, in {minutes} minutes on {system}"
    )
    recipe = _bert(f"{name}-{round_}", *settings, reference=source, expected=expected, **fields)
    return Result(recipe, round_, system, minutes, source, examples, topology)


def _resnet_result(name, round_, system, minutes, epochs, commit, folder, *settings, topology=""):
    """Returns a `Result` of ResNet-50. `epochs` is the mean number of epochs to the target."""
    source = _logs(round_, commit, folder)
    expected = (
        f"ImageNet top-1 {RESNET_TARGET} after {epochs:g} epochs on average, in {minutes} minutes "
        f"on {system}"
    )
    recipe = _resnet(
        f"{name}-{round_}", *settings, reference=source, expected=expected, tpu="TPU" in system
    )
    return Result(recipe, round_, system, minutes, source, epochs * IMAGENET_IMAGES, topology)


# Google's TPU runs clip each replica's gradient and sum in bfloat16.
_GOOGLE_BERT = {"clip_each_replica": True, "sum_dtype": "bfloat16"}

BERT_RESULTS = (
    Result(
        MLPERF_V07,
        "0.7",
        "Google, 4,096 TPU v3 (v3-8192)",
        0.393,
        _logs("0.7", "0a8a85a2", "Google/results/tpu-v3-8192-TF/bert"),
        496 * 8_192,
    ),
    _bert_result(
        *("v4-6912", "1.0", "Google, 3,456 TPU v4 (v4-6912)", 0.276, 3_512_678),
        *("50619b5d", "Google/results/tpu-v4-6912-TF/bert"),
        *(6_912, 0.0029293, (0.7206, 0.78921), 0.001, (0, -700), 700),
        topology="v4-6912",
        **_GOOGLE_BERT,
    ),
    _bert_result(
        *("a100-4320", "1.1", "NVIDIA, 4,320 A100", 0.226, 4_624_128),
        *("ebe92f81", "NVIDIA/results/dgxa100_n540_ngc21.09_pytorch/bert"),
        *(12_960, 0.0032, (0.75, 0.9), 0.0166629, (290, -100), 475),
        clip_each_replica=True,
    ),
    _bert_result(
        *("v4-8192", "2.0", "Google, 4,096 TPU v4 (v4-8192)", 0.179, 4_780_842),
        *("8437fbb7", "Google/results/cloud-tpu-v4-8192-TF/bert"),
        *(14_336, 0.0034064947274845907, (0.8069036244593849, 0.8731040542461879)),
        *(0.021344844194329957, (314, -112), 454),
        # No topology: 3.5 sequences a chip on average, in buckets of 2 to 14 by length.
        **_GOOGLE_BERT,
    ),
    _bert_result(
        *("a100-4096", "2.1", "NVIDIA, 4,096 A100", 0.206, 5_468_895),
        *("158189d4", "NVIDIA/results/dgxa100_n512_ngc22.04_pytorch/bert"),
        *(16_384, 0.0033, (0.75, 0.9), 0.0166629, (290, -100), 470),
        clip_each_replica=True,
    ),
    _bert_result(
        *("h100-3072", "3.0", "NVIDIA and CoreWeave, 3,072 H100", 0.134, 4_821_584),
        *("63e326c4", "NVIDIA_CoreWeave/results/coreweave_hgxh100_n384_ngc23.04_pytorch/bert"),
        *(12_288, 0.0031, (0.8, 0.925), 0.0166629, (300, -100), 500),
    ),
    _bert_result(
        *("h100-3472", "3.1", "NVIDIA, 3,472 H100", 0.119, 5_460_762),
        *("d06288b2", "NVIDIA/results/eos_n434_ngc23.09_pytorch/bert"),
        *(13_888, 0.0036, (0.75, 0.9), 0.0166629, (290, -100), 480),
    ),
    _bert_result(
        *("gb200-512", "5.0", "NVIDIA, 512 GB200", 0.305, 3_961_206),
        *("0fdc28f0", "NVIDIA/results/tyche_ngpu512_ngc25.04_pytorch/bert"),
        *(8_192, 0.00344, (0.7206, 0.78921), 0.1, (170_200, -200_000), 600),
        clip_each_replica=True,
    ),
)

RESNET_RESULTS = (
    # The fastest of round 0.6, Fujitsu's 1.17 minutes on 2,048 V100, is of the open division.
    Result(
        LARS_32K,
        "0.6",
        "Google, 1,024 TPU v3 (v3-2048)",
        1.282,
        _logs("0.6", "f312518c", "Google/results/tpu-v3-2048/resnet"),
        None,
        "v3-2048",
    ),
    _resnet_result(
        *("v3-8192", "0.7", "Google, 4,096 TPU v3 (v3-8192), JAX", 0.472, 91.2),
        *("0a8a85a2", "Google/results/tpu-v3-8192-JAX/resnet"),
        *(65_536, 23.080977304670448, 33, 0.9537213777059405, 1e-4, 1_811),
    ),
    _resnet_result(
        *("v4-6912", "1.0", "Google, 3,456 TPU v4 (v4-6912)", 0.229, 78.4),
        *("50619b5d", "Google/results/tpu-v4-6912-TF/resnet"),
        *(55_296, 25.67, 29, 0.94053, 1e-4, 1_860),
        topology="v4-6912",
    ),
    _resnet_result(
        *("a100-4320", "1.1", "NVIDIA, 4,320 A100", 0.347, 85),
        *("ebe92f81", "NVIDIA/results/dgxa100_n540_ngc21.09_mxnet/resnet"),
        *(64_800, 24.699, 31, 0.951807, 1e-4, 1_779),  # 90 epochs
    ),
    _resnet_result(
        *("v4-8192", "2.0", "Google, 4,096 TPU v4 (v4-8192)", 0.191, 60),
        *("8437fbb7", "Google/results/cloud-tpu-v4-8192-TF/resnet"),
        *(32_768, 27.5, 16, 0.9321, 1e-4, 2_355),
        topology="v4-8192",
    ),
    _resnet_result(
        *("a100-4216", "2.1", "NVIDIA, 4,216 A100", 0.319, 86),
        *("158189d4", "NVIDIA/results/dgxa100_n527_ngc22.04_mxnet/resnet"),
        *(67_456, 24.699, 31, 0.951807, 1e-4, 1_709),  # 90 epochs
    ),
    _resnet_result(
        *("h100-3584", "3.0", "NVIDIA and CoreWeave, 3,584 H100", 0.183, 77),
        *("63e326c4", "NVIDIA_CoreWeave/results/coreweave_hgxh100_n448_ngc23.04_mxnet/resnet"),
        *(57_344, 23.0, 32, 0.95, 2.5e-5, 1_743),  # 78 epochs
    ),
)

# Batch, million sequences to the target (mean and deviation), runs, rate, betas, weight decay,
# warm-up, steps. The runs with a warm-up from step -700 have none: it ends before step 0.
_BERT_POINTS = (
    (256, 2.552704, 0.224080, 20, 3.5e-4, (0.9, 0.999), 0.01, (0, 0), 13_700),
    (448, 2.410630, 0.201829, 23, 4.25e-4, (0.9, 0.999), 0.01, (0, 0), 6_700),
    (1_536, 2.777588, 0.084343, 20, 2e-3, (0.66, 0.996), 0.01, (0, 0), 2_254),
    (3_072, 2.768215, 0.170435, 20, 2e-3, (0.66, 0.998), 0.01, (100, 0), 1_141),
    (4_096, 2.843443, 0.119629, 20, 2.4e-3, (0.66, 0.998), 0.01, (0, 0), 855),
    (4_608, 2.794752, 0.134366, 20, 3.5e-3, (0.62, 0.9), 0.01, (0, 0), 700),
    (6_144, 3.321446, 0.150502, 20, 2.9293e-3, (0.7206, 0.78921), 0.001, (0, -700), 700),
    (6_912, 3.596122, 0.124957, 20, 2.9293e-3, (0.7206, 0.78921), 0.001, (0, -700), 700),
    (8_192, 4.191437, 0.090728, 20, 2.88293e-3, (0.88, 0.88), 0.0166629, (287, -76), 600),
    (8_704, 4.278144, 0.137525, 20, 2.971656225e-3, (0.88, 0.88), 0.0166629, (287, -76), 600),
    (12_288, 4.470336, 0.090865, 20, 3.1e-3, (0.8, 0.925), 0.0166629, (300, -100), 500),
    (13_056, 4.632576, 0.183668, 20, 3.19540686e-3, (0.8, 0.925), 0.0166629, (300, -100), 500),
    (16_384, 5.504307, 0.148400, 20, 3.3e-3, (0.75, 0.9), 0.0166629, (290, -100), 600),
)
# Batch, epochs to the target (mean and deviation), runs, rate, warm-up epochs, momentum, weight
# decay, steps, and whether TPUs ran it. The points list "decay steps", which some submitters count
# from the start and others from the end of warm-up. Here they are read so that the schedule ends
# soon after the target: from the end of warm-up at 1,632, 8,192, 65,536 and 67,840.
_RESNET_POINTS = (
    (1_632, 35.0, 1.12, 17, 7.4, 2, 0.9, 5e-5, 29_046, False),
    (3_264, 35.2, 0.77, 15, 10.5, 2, 0.9, 5e-5, 14_523, False),
    (4_096, 40.0, 1.05, 10, 10.0, 5, 0.9, 2e-4, 13_137, True),
    (8_192, 42.0, 1.05, 10, 17.0, 5, 0.9, 2e-4, 6_876, True),
    (13_056, 45.4, 0.70, 10, 12.8, 9, 0.9, 2.5e-5, 4_710, False),
    (32_768, 56.0, 0.47, 10, 21.2, 16, 0.94, 2.5e-5, 2_267, True),
    (49_152, 68.0, 0.67, 10, 19.405, 24, 0.951807, 1e-4, 1_846, False),
    (58_880, 79.9, 0.88, 10, 23.246, 29, 0.951807, 1e-4, 1_785, False),
    (65_536, 84.5, 0.97, 10, 24.699, 31, 0.951807, 1e-4, 1_738, True),
    (67_840, 85.86, 0.65, 28, 24.699, 31, 0.951807, 1e-4, 1_718, False),
)


def _bert_reference(batch, millions, deviation, runs, *settings):
    source = f"{REFERENCE_COMMIT}/training_5.1.0/rcps_bert.json, bert_ref_{batch}"
    recipe = _bert(
        f"batch-{batch}",
        batch,
        *settings,
        reference=source,
        expected=f"masked-token accuracy {BERT_TARGET:.3f} after {millions:.3f} ± {deviation:.3f} "
        f"million sequences ({runs} runs)",
        clip_each_replica=True,
    )
    return Reference(recipe, round(millions * 1e6), round(deviation * 1e6), runs, source)


def _resnet_reference(batch, epochs, deviation, runs, *settings):
    *settings, tpu = settings
    source = f"{REFERENCE_COMMIT}/training_4.0.0/rcps_resnet.json, resnet_ref_{batch}"
    recipe = _resnet(
        f"batch-{batch}",
        batch,
        *settings,
        reference=source,
        expected=f"ImageNet top-1 {RESNET_TARGET} after {epochs:g} ± {deviation:.2g} epochs "
        f"({runs} runs)",
        tpu=tpu,
    )
    return Reference(recipe, epochs * IMAGENET_IMAGES, deviation * IMAGENET_IMAGES, runs, source)


BERT_REFERENCES = tuple(_bert_reference(*point) for point in _BERT_POINTS)
RESNET_REFERENCES = tuple(_resnet_reference(*point) for point in _RESNET_POINTS)
RESULTS = (*BERT_RESULTS, *RESNET_RESULTS)
REFERENCES = (*BERT_REFERENCES, *RESNET_REFERENCES)
MLPERF_RECIPES = tuple(
    record.recipe
    for record in (*RESULTS, *REFERENCES)
    if record.recipe not in (MLPERF_V07, LARS_32K)
)
