"""The tables of experiments, as data."""

import math

from experiments.grid import Group, Table
from experiments.imagenet import imagenet_table

# MNIST: arXiv:1904.00962, appendix, Table 8. The rates are the paper's. The paper does not specify
# the schedule; warm-up of one epoch and polynomial decay with power 0.5 are those of the author's
# programs for LAMB and AdamW.
MNIST = {"data": "mnist", "model": "lenet5", "epochs": 30}
CHANCE = 0.12  # one class of ten, for every image: 0.1135 of MNIST's test set, 0.1 of CIFAR-10's
PAPER_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
DECAY = {"adamw": 0.01, "lamb": 0.01, "lars": 1e-4}


def _mnist_table() -> Table:
    groups = tuple(
        Group(
            optimizer,
            {
                **MNIST,
                "optimizer": optimizer,
                "batch": 1_024,
                "weight_decay": DECAY.get(optimizer),
                "warmup_steps": 59,
                "power": 0.5,
            },
            PAPER_RATES,
            seeds=(1, 2, 3, 4, 5),
        )
        for optimizer in ("lamb", "adamw", "adam", "adagrad", "momentum")
    )
    return Table(
        "mnist",
        "MNIST and LeNet, five optimizers",
        "keras",
        "accuracy",
        groups,
        pairs=tuple(("lamb", group.name) for group in groups[1:]),
        published={
            "momentum": 0.9933,
            "adagrad": 0.9928,
            "adam": 0.9936,
            "adamw": 0.9941,
            "lamb": 0.9945,
        },
        chance=CHANCE,
        text="""\
Table 8 of the [paper](https://arxiv.org/abs/1904.00962): MNIST, batch 1,024, 30 epochs, learning
rates 0.0001, 0.001, 0.01 and 0.1, the best of them with five seeds. The network is LeNet-5 (61,706
parameters) with ReLU and max pooling; the paper says no more than "LeNet". The optimizers are
Keras's own and `tf_lamb.LAMB`, passed to `model.compile`. Weight decay is 0.01 for LAMB and AdamW,
without biases, and 0 for the others; momentum is 0.9; all else is Keras's and the paper's default.
Not tuned: weight decay, momentum, β, ε, warm-up (one epoch) and decay (power 0.5).

The [author's programs](https://github.com/fastalgo/mnist_tpu) train a different network, of
3,274,634 parameters with dropout (32 and 64 filters of 5×5, a layer of 1,024), and for LAMB and
AdamW a learning rate of 0.004, which is not in the published grid. The five logs of LAMB there that
have this rate and one epoch of warm-up give 0.9935, 0.9938, 0.9941, 0.9941 and 0.9947.""",
    )


# The rates of the author's logs in github.com/fastalgo/mnist_tpu: lamb/log2, adamw and
# momentum_poly/best. The momentum runs have no warm-up there.
AUTHOR_RATES = {"lamb": 0.004, "adamw": 0.004, "momentum": 0.08}


def _author_table() -> Table:
    groups = tuple(
        Group(
            optimizer,
            {
                **MNIST,
                "backend": "jax",
                "model": "mnist_cnn",
                "optimizer": optimizer,
                "batch": 1_024,
                "weight_decay": DECAY.get(optimizer),
                "warmup_steps": 0 if optimizer == "momentum" else 59,
                "power": 0.5,
            },
            (rate,),
            seeds=(1, 2, 3, 4, 5),
        )
        for optimizer, rate in AUTHOR_RATES.items()
    )
    return Table(
        "mnist-author",
        "MNIST, the network and rates of the paper's author",
        "keras",
        "accuracy",
        groups,
        pairs=(("lamb", "adamw"), ("lamb", "momentum")),
        published={"momentum": 0.9933, "adamw": 0.9941, "lamb": 0.9945},
        one_core=False,
        chance=CHANCE,
        text="""\
The network, learning rates, warm-up epochs and power of the decay of the
[author's programs and logs](https://github.com/fastalgo/mnist_tpu) for batch 1,024: 3,274,634
parameters with dropout, 30 epochs. Nothing is tuned here. His programs differ in this: they clip
the gradients of LAMB and AdamW to a global norm of 1, without bias correction of the moments;
AdamW's ε is 1e-6 (here 1e-7); an epoch of warm-up is 48 steps of 50,000 images (here 59 steps); the
rate of momentum ends at 1e-4 (here at 0).""",
    )


SWEEP_BATCHES = (256, 1_024, 4_096, 16_384, 60_000)
# First rates at batch size 1,024. At other batch sizes they are multiplied by √(batch / 1,024).
SWEEP_RATES = {"lamb": 0.01, "lars": 10.0, "momentum": 0.1, "nesterov": 0.1, "adamw": 0.003}
SWEEP_WARMUP = 10


def _sweep_table() -> Table:
    def settings(optimizer, batch):
        return {
            **MNIST,
            # Of XLA's convolutions some need over 5 GiB for a batch of the whole set.
            "backend": "jax" if batch < 60_000 else "tensorflow",
            "optimizer": optimizer,
            "batch": batch,
            "weight_decay": DECAY.get(optimizer),
            "warmup_steps": SWEEP_WARMUP,
            "power": 1.0,
        }

    groups = []
    for batch in (1_024, 4_096, 16_384, 256, 60_000):
        for optimizer, rate in SWEEP_RATES.items():
            scaled = rate * math.sqrt(batch / 1_024)
            rates = tuple(float(f"{scaled * factor:.2g}") for factor in (10**-0.5, 1, 10**0.5))
            groups.append(Group(f"{optimizer}-{batch}", settings(optimizer, batch), rates))
        if batch != 1_024:
            factor = math.sqrt(batch / 1_024)
            name = f"lamb-untuned-{batch}"
            rule = ("lamb-1024", factor)
            groups.append(Group(name, settings("lamb", batch), rate_from=rule))
    others = [name for name in SWEEP_RATES if name != "lamb"]
    pairs = [(f"lamb-{batch}", f"{other}-{batch}") for batch in SWEEP_BATCHES for other in others]
    larger = [batch for batch in SWEEP_BATCHES if batch > 1_024]
    pairs += [
        *((f"lamb-untuned-{batch}", "lamb-1024") for batch in larger),
        *((f"adamw-{batch}", "adamw-1024") for batch in larger),
    ]
    return Table(
        "mnist-batches",
        "MNIST, from batch 256 to the whole set",
        "keras",
        "accuracy",
        tuple(groups),
        pairs=tuple(pairs),
        x="batch",
        heat_maps=("lamb-1024", "lamb-16384"),
        one_core=False,
        chance=CHANCE,
        text="""\
The paper's claim is that a larger batch, for the same epochs, gives the same accuracy without new
tuning. LeNet-5 on MNIST for 30 epochs, from batch 256 (7,031 steps) to 60,000, the whole training
set (30 steps). Keras runs on JAX, at batch 60,000 on TensorFlow. Each optimizer is tuned at each
batch size. "LAMB, untuned" tests the claim: it has the learning rate that is best at 1,024, times
√(batch / 1,024), and the same 10 steps of warm-up, which are more epochs as the batch grows
(`tf_lamb.scale_batch` with `rule="sqrt"`). All optimizers have this warm-up. The rate decays
linearly to 0. Weight decay is 0.01 for LAMB and AdamW, 0.0001 for LARS, 0 for the others; momentum
is 0.9. Not tuned: weight decay, momentum, β, ε, warm-up and decay.

Where the rule's rate is also the best one of "LAMB" at that batch, both rows are the same run. At
256 and 16,384 seeds 2 and 3 were run twice, on a GPU, which does not repeat a run bit for bit: the
two rows differ there by up to 0.001.""",
    )


def _backend_table() -> Table:
    groups = tuple(
        Group(
            backend,
            {
                **MNIST,
                "backend": backend,
                "epochs": 5,
                "optimizer": "lamb",
                "batch": 1_024,
                "weight_decay": DECAY["lamb"],
                "warmup_steps": 59,
                "power": 0.5,
            },
            (0.01,),
        )
        for backend in ("tensorflow", "jax")
    )
    return Table(
        "mnist-backends",
        "The same run on TensorFlow and on JAX",
        "keras",
        "accuracy",
        groups,
        pairs=(("tensorflow", "jax"),),
        chance=CHANCE,
        text="""\
LAMB on MNIST as in [Table 8](mnist.md), batch 1,024 and rate 0.01, for 5 epochs, with Keras on
TensorFlow and on JAX. The order of the images is the same; the initial weights are drawn by each
backend and differ. Nothing is tuned here.""",
    )


# CIFAR-10, Table 7: rates around the best ones that the author's programs name, at batch size 512.
# At other batch sizes they are multiplied by √(batch / 512).
DAVIDNET = {
    "data": "cifar10",
    "model": "davidnet",
    "epochs": 24,
    "power": 1.0,
    "crop": True,
}
DAVIDNET_RATES = {
    "lamb": (0.005, 0.01, 0.02, 0.04),
    "momentum": (0.1, 0.2, 0.4, 0.8),
    "adamw": (0.001, 0.002, 0.004, 0.008),
    "adam": (0.001, 0.002, 0.004, 0.008),
    "adagrad": (0.01, 0.02, 0.04, 0.08),
}
DAVIDNET_DECAY = {"lamb": 1.0, "adamw": 0.01, "momentum": 5e-4}
DAVIDNET_PUBLISHED = {
    "adagrad-512": 0.9074,
    "adam-512": 0.9225,
    "adamw-512": 0.9271,
    "momentum-512": 0.9372,
    "lamb-512": 0.9408,
}
DAVIDNET_TEXT = """\
Data, crops and flips, weights and the triangular schedule with 6 epochs of warm-up are those of the
[author's program](https://github.com/fastalgo/davidnet-cifar), λ is 1.0 for LAMB as in his best
run, and the rates lie around those that he names. Three things differ. He also cuts a square of
8×8 pixels out of each training image, which is not done here. His LAMB has no bias correction, here
it has. His loss is a sum over the batch, here it is the mean: LAMB and Adam do not depend on the
factor, and the rates of momentum are those for the mean. Not tuned:
weight decay (0.01 for AdamW, 0.0005 for momentum, 0 for Adam and Adagrad), momentum (0.9), β, ε,
warm-up and decay. For momentum SGD, Keras subtracts the weight decay from the weights, outside of
the momentum, so that the same number acts a tenth as much as it would as an L2 term of the loss."""


def _davidnet_group(optimizer, batch, seeds, more) -> Group:
    rates = [rate * math.sqrt(batch / 512) for rate in DAVIDNET_RATES[optimizer]]
    settings = {
        **DAVIDNET,
        **more,
        "optimizer": optimizer,
        "batch": batch,
        "weight_decay": DAVIDNET_DECAY.get(optimizer),
        "warmup_steps": round(6 * 50_000 / batch),
    }
    rates = tuple(float(f"{rate:.2g}") for rate in rates)
    return Group(f"{optimizer}-{batch}", settings, rates, seeds=seeds)


def _cifar_table() -> Table:
    groups = [
        _davidnet_group(optimizer, batch, (1, 2), {"width": 16, "dtype": "mixed_bfloat16"})
        for batch, optimizers in ((512, DAVIDNET_RATES), (4_096, ("lamb", "momentum")))
        for optimizer in optimizers
    ]
    return Table(
        "cifar10",
        "CIFAR-10 and DavidNet, five optimizers",
        "keras",
        "accuracy",
        tuple(groups),
        pairs=(
            *(("lamb-512", f"{name}-512") for name in DAVIDNET_RATES if name != "lamb"),
            ("lamb-4096", "momentum-4096"),
        ),
        published=DAVIDNET_PUBLISHED,
        chance=CHANCE,
        text=f"""\
Table 7 of the [paper](https://arxiv.org/abs/1904.00962): CIFAR-10, batch 512, 24 epochs. The
network is DavidNet at a quarter of its published width (16 channels, 412,944 trainable parameters,
where 64 channels have 6,573,120), because two cores are too slow for full width; the published
column is of full width and cannot be compared. The policy is mixed_bfloat16, as at [full
width](cifar10-full.md). On a core with AVX512_BF16, a step of momentum SGD at batch 512 took 0.82 s
with it and 1.08 s in float32; it took 0.70 s with TensorFlow's own clustering of elementwise
operations, with which these runs were made: `TF_XLA_FLAGS="--tf_xla_auto_jit=2
--tf_xla_cpu_global_jit --tf_xla_ops_to_cluster=PW --tf_xla_min_cluster_size=2"`.
{DAVIDNET_TEXT}""",
    )


def _full_cifar_table() -> Table:
    full = {"width": 64, "backend": "jax", "dtype": "mixed_bfloat16"}
    groups = [_davidnet_group(name, 512, (1, 2, 3), full) for name in DAVIDNET_RATES]
    for batch in (8_192, 2_048):
        for optimizer in ("lamb", "momentum", "adamw"):
            groups.append(_davidnet_group(optimizer, batch, (1, 2, 3), full))
        rule = ("lamb-512", math.sqrt(batch / 512))
        groups.append(Group(f"lamb-untuned-{batch}", groups[-3].settings, rate_from=rule))
    return Table(
        "cifar10-full",
        "CIFAR-10 and DavidNet at full width",
        "keras",
        "accuracy",
        tuple(groups),
        pairs=(
            *(("lamb-512", f"{name}-512") for name in DAVIDNET_RATES if name != "lamb"),
            *(
                (f"lamb-{batch}", f"{other}-{batch}")
                for batch in (2_048, 8_192)
                for other in ("momentum", "adamw")
            ),
            *((f"lamb-untuned-{batch}", "lamb-512") for batch in (2_048, 8_192)),
        ),
        published=DAVIDNET_PUBLISHED,
        x="batch",
        one_core=False,
        chance=CHANCE,
        text=f"""\
Table 7 of the [paper](https://arxiv.org/abs/1904.00962) with its network, 6,573,120 trainable
parameters, at batch 512, 24 epochs, and the same epochs at 2,048 and 8,192. It needs a GPU: Keras
runs on JAX, with the policy mixed_bfloat16 (float32 weights, updates and loss). "LAMB, untuned" has
the rate that is best at 512, times √(batch / 512), and 6 epochs of warm-up, as at 512.
{DAVIDNET_TEXT}

Give `--jobs` only after a first run at each batch size, `--limit=1`: runs at the same time disturb
each other while XLA times kernels. On an H200, this took a minute at batch 2,048 with two runs, and
more than 2 minutes with five; at batch 8,192, two runs had not finished it after 8 minutes, beside
five of 2,048.""",
    )


# BERT: the large batch is near the gradient noise scale, the small one 32 times below.
BERT_LARGE_BATCH = 256
BERT_SMALL_BATCH = 8
BERT_STEPS = 1_000  # at the large batch
BERT_SEQUENCES = BERT_STEPS * BERT_LARGE_BATCH
BERT_RATES = {"lamb": 0.00125, "adamw": 0.0005}  # expected best ones at the small batch


def _bert_table() -> Table:
    def settings(optimizer, batch):
        steps = BERT_SEQUENCES // batch
        return {
            "recipe": "bert-mini-demo",
            "batch": batch,
            "flags": {"global_batch_size": batch, "steps": steps, "steps_per_loop": steps // 50},
            "set": {
                "optimizer": optimizer,
                # As many at each batch size, which is the paper's linear-epoch warm-up: 1/5 of the
                # steps at the large batch, as at the paper's 32K.
                "warmup_steps": BERT_STEPS // 5,
                "evaluate_every_examples": BERT_SEQUENCES // 10,
                "save_every_steps": steps // 5,
                "keep_checkpoints": 1,
                "telemetry": "false",
            },
            "rates": {"peak_learning_rate": 1.0},
            "curve": ["masked_loss", "masked_accuracy"],
            "evaluations": ["masked_loss", "masked_accuracy"],
        }

    groups = []
    for batch in (BERT_LARGE_BATCH, BERT_SMALL_BATCH):
        for optimizer, rate in BERT_RATES.items():
            scaled = rate * math.sqrt(batch / BERT_SMALL_BATCH)
            rates = tuple(float(f"{scaled * factor:.2g}") for factor in (0.5, 1, 2))
            groups.append(Group(f"{optimizer}-{batch}", settings(optimizer, batch), rates))
    large = BERT_LARGE_BATCH
    small = BERT_SMALL_BATCH
    untuned = f"lamb-untuned-{large}"
    rule = (f"lamb-{small}", math.sqrt(large / small))
    groups.append(Group(untuned, settings("lamb", large), rate_from=rule))
    return Table(
        "bert",
        "BERT at the noise scale and 32 times below",
        "train",
        "masked_accuracy",
        tuple(groups),
        pairs=(
            (f"lamb-{small}", f"adamw-{small}"),
            (f"lamb-{large}", f"adamw-{large}"),
            (untuned, f"lamb-{large}"),
            (untuned, f"adamw-{large}"),
            (f"lamb-{large}", f"lamb-{small}"),
            (f"adamw-{large}", f"adamw-{small}"),
        ),
        x="batch",
        text=f"""\
BERT-tiny on the articles of [Wikipedia](wikipedia.md), length 64, {BERT_SEQUENCES:,} sequences at
each batch size: {BERT_STEPS:,} steps of {large} and {BERT_SEQUENCES // small:,} steps of {small}.
The gradient noise scale of this model on this text was measured first, at batch 256 and rate 0.0071
(2026-11-26, commit 75b6efa): 108 sequences over steps 101 to 200, with 60 to 564 in each 25 of
these steps, and it grows during training, so {large} is near it.

"LAMB, untuned" has the rate that is best at {small}, times √{large // small}. All have
{BERT_STEPS // 5} steps of warm-up, the paper's linear-epoch rule, then a linear decay to 0. The
metric is the accuracy of masked tokens of held-out articles after the last step. Not tuned: weight
decay (0.01), β, ε, warm-up and decay. `DATA` is the folder of prepared shards:

```bash
python train.py --recipe=bert-mini-demo --data_dir=enwiki-articles.jsonl.gz \\
    --set vocabulary_size=8000 --steps=4 --model_dir=runs/vocabulary        # learns vocab.txt
python -m inputs.text.prepare --input=enwiki-articles.jsonl.gz --vocab=runs/vocabulary/vocab.txt \\
    --output=DATA
```""",
    )


def _one_batch_table() -> Table:
    return Table(
        "one-batch",
        "One batch memorized",
        "one_batch",
        "accuracy",
        (Group("resnet50-one-batch", {"recipe": "resnet50-one-batch"}, (0.03,), seeds=(1,)),),
        text="""\
A check, not a comparison: all layers of ResNet-50, at a quarter of their width, overfit one batch
of 220 ImageNet photographs at 224 pixels (recipe `resnet50-one-batch`, LAMB), and the SavedModel
classifies their files. `accuracy` is the share of files that it names right. `DATA` is a tar of
JPEG files with its CSV and classes.csv beside it.""",
    )


TABLES = {
    table.name: table
    for table in (
        _mnist_table(),
        _author_table(),
        _sweep_table(),
        _backend_table(),
        _cifar_table(),
        _full_cifar_table(),
        _bert_table(),
        imagenet_table(),
        _one_batch_table(),
    )
}
