"""Image classification as a task: data, model, losses, export and report from a recipe."""

import functools
import hashlib
import os
import sys
import tempfile

from export.model_card import make_card
from export.resnet import classifier_export
from export.saved_model import run_client, write_export
from inputs import synthetic
from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.images import examples
from inputs.images.sources import check_same_classes
from models import resnet

SYNTHETIC_CLASSES = 1_000
SHOWN_IMAGES = 4
USAGE = """\
classify = model.signatures["serving_default"]
classify(image=tf.constant([open("a.jpg", "rb").read()]))  # names, wnids, probabilities, error"""


class ImageClassification:
    """A ResNet that learns to tell classes of images.

    Args:
        recipe: a `recipes.resnet.ImageRecipe`.
        data_dir: folder with train/ and validation/, as `inputs.images.prepare` writes them.
        vocab: must be "".
        model_dir: not used; nothing is learned from the data beside the weights.
        seed: int, decides order, crops and flips.
        synthetic_data: makes batches up instead of reading images.
        log: takes lines about what is read.

    Raises:
        InputError: the images cannot be used.
    """

    unit = "images"
    counts = staticmethod(resnet.classification_counts)
    best_metric = "image_top1"

    def __init__(self, recipe, *, data_dir, vocab, model_dir, seed, synthetic_data, log):
        del model_dir
        if vocab:
            raise InputError(f"--vocab={vocab}: a vocabulary is for text. Leave it out.")
        if recipe.model not in resnet.SIZES:
            raise InputError(
                f"--set model={recipe.model}: no such size. There are: {', '.join(resnet.SIZES)}."
            )
        self.recipe, self._seed, self._synthetic = recipe, seed, synthetic_data
        self.sums = functools.partial(
            resnet.classification_sums, label_smoothing=recipe.label_smoothing
        )
        if synthetic_data:
            count = 10 if recipe.normalization == "cifar10" else SYNTHETIC_CLASSES
            self._classes = [(f"class{i}", f"class{i}") for i in range(count)]
            self._padding = 0
            self.data = self.fingerprint = self.amount = "synthetic data"
            return
        if not data_dir:
            raise InputError(
                "--data_dir: give the folder that `python -m inputs.images.prepare` wrote, or "
                "--synthetic."
            )
        self.data = data_dir
        folders = [os.path.join(data_dir, split) for split in ("train", "validation")]
        self._training = self._images(folders[0], recipe.augmentation, recipe.mixup_alpha)
        self._held_out = self._images(folders[1], "none", 0.0)
        manifests = self._training.manifest, self._held_out.manifest
        self._classes = manifests[0]["classes"]
        check_same_classes(self._classes, manifests[1]["classes"], *folders)
        self._padding = self._held_out.padding
        hashes = "".join(manifest["hash"] for manifest in manifests)
        self.fingerprint = hashlib.sha256(hashes.encode()).hexdigest()[:16]
        self.amount = (
            f"{self._training.number:,} images of {len(self._classes):,} classes to train on, "
            f"{self._held_out.number:,} held out"
        )
        log(self.amount)

    def _images(self, folder, augmentation, mixup_alpha):
        share, skip = self.recipe.max_bad_record_share, self.recipe.on_bad_record == "skip"
        return examples.Images(
            folder,
            self.recipe.image_size,
            seed=self._seed,
            augmentation=augmentation,
            mixup_alpha=mixup_alpha,
            # Each process of a cluster reads its own share, and says itself what is wrong with it.
            bad_records=BadRecords(share, skip=skip, say=lambda line: print(line, file=sys.stderr)),
        )

    @property
    def facts(self) -> dict[str, str]:
        """What the meaning of the weights depends on beside the recipe."""
        return {"data": self.fingerprint}

    def write_files(self, model_dir: str) -> None:
        """Nothing: a later start needs the images alone."""

    def build_model(self):
        """The network, on the strategy in scope."""
        return resnet.build_classifier(
            resnet.SIZES[self.recipe.model],
            self.recipe.image_size,
            len(self._classes),
            normalization=self.recipe.normalization,
            batch_norm_momentum=self.recipe.batch_norm_momentum,
            space_to_depth=self.recipe.space_to_depth,
            sync_batch_norm=self.recipe.sync_batch_norm,
        )

    def train_batches(self, number: int, first_step: int):
        """`context -> tf.data.Dataset` of phase `number` (from 0), from its `first_step` on."""
        size = self.recipe.phases[number].global_batch_size
        if self._synthetic:
            return lambda context: self._made_up(size, context)
        return lambda context: self._training.training_batches(size, context, first_step)

    def evaluation_batches(self, number: int):
        """`context -> tf.data.Dataset` of the held-out images."""
        size = self.recipe.phases[number].global_batch_size
        if self._synthetic:
            return lambda context: self._made_up(size, context).take(2)
        limit = self.recipe.evaluation_examples
        return lambda context: self._held_out.evaluation_batches(size, limit, context)

    def _made_up(self, global_batch_size, context):
        size = global_batch_size // (context.num_replicas_in_sync if context else 1)
        spec = examples.element_spec(size, self.recipe.image_size)
        return synthetic.synthetic_batches(
            spec, {"image": 256, "label": len(self._classes)}, self._seed
        )

    def final_metrics(self, model, strategy, model_dir: str | None) -> dict[str, float]:
        """Nothing beyond the last evaluation; says how many images could not be read."""
        del model, strategy, model_dir
        if not self._synthetic:
            for split in (self._training, self._held_out):
                split.bad_records.end()
        return {}

    def results(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of the last evaluation as they are."""
        return metrics

    def in_words(self, results: dict[str, float]) -> str:
        """What `results` say about the held-out images."""
        return (
            f"top-1 accuracy {results['image_top1']:.4f}, top-5 {results['image_top5']:.4f}, "
            f"loss {results['image_loss']:.4f}"
        )

    def show(self, export_dir: str) -> None:
        """Prints what the SavedModel says of held-out images, in a process of its own."""
        if self._synthetic:
            return
        print("Held-out images, by the SavedModel in a process of its own:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for data, label in self._held_out.files(SHOWN_IMAGES):
                name = self._classes[label][1].replace(os.sep, " ")
                paths.append(os.path.join(folder, f"{len(paths)} {name}"))
                with open(paths[-1], "wb") as file:
                    file.write(data)
            run_client(export_dir, *paths)

    def export(self, model, export_dir: str, results: dict[str, float]) -> None:
        """Writes the SavedModel that names images."""
        card = make_card(self, model.count_params(), results, USAGE)
        made = classifier_export(model, self._classes, self.recipe.image_size, self._padding)
        write_export(made, card, export_dir)
