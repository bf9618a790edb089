"""Image classification with ResNet."""

import hashlib
import os
import tempfile

from export.model_card import make_card
from export.resnet import classifier_export
from export.saved_model import run_client, write_export
from inputs.damage import Reports
from inputs.errors import InputError
from inputs.images import examples
from inputs.images.sources import check_same_classes
from models import resnet
from tasks import synthetic as synthetic_data
from tasks.task import Metric, Task, loss_metric

IMAGENET_CLASSES = 1_000
CIFAR10_CLASSES = 10
SHOWN_IMAGES = 4
USAGE = """\
classify = model.signatures["serving_default"]
classify(image=tf.constant([open("a.jpg", "rb").read()]))  # names, wnids, probabilities, error"""


class ImageClassification(Task):
    """A ResNet that classifies images.

    Args:
        recipe: a `recipes.resnet.ImageRecipe`.
        data_dir: a folder with train/ and validation/, written by `inputs.images.prepare`.
        vocab: must be "".
        resume_dir: not used.
        seed: int, seed of the data order, crops and flips.
        synthetic: whether to use random batches instead of images.
        log: takes lines of progress.
        cache_dir: not used.
        shared_dir, reports: see `tasks.task.Task`.
    """

    example_unit = "images"
    metrics = (
        loss_metric("image_loss", "image"),
        Metric("image_top1", "image", higher_is_better=True),
        Metric("image_top5", "image", higher_is_better=True),
    )
    best_metric = metrics[1]

    def __init__(
        self,
        recipe,
        *,
        data_dir,
        vocab,
        resume_dir,
        seed,
        synthetic,
        log,
        cache_dir="",
        shared_dir="",
        reports=None,
    ):
        del resume_dir, cache_dir
        if vocab:
            raise InputError(f"--vocab={vocab}: a vocabulary is for text. Leave --vocab out.")
        if recipe.model not in resnet.SIZES:
            raise InputError(
                f"--set model={recipe.model}: no such size. Sizes: {', '.join(resnet.SIZES)}."
            )
        self.recipe = recipe
        self._source = (
            _SyntheticImages(recipe, seed)
            if synthetic
            else _Images(
                recipe, data_dir, seed, log, reports or Reports.of_one_process(log, shared_dir)
            )
        )
        self.data = self._source.description
        self.amount = self._source.amount
        self.training_examples = self._source.training_examples
        self.facts = {"data": self._source.fingerprint}

    def build_model(self):
        """Returns the classifier; normalization of pixel values is part of it."""
        return resnet.build_classifier(
            resnet.SIZES[self.recipe.model],
            self.recipe.image_size,
            len(self._source.classes),
            normalization=self.recipe.normalization,
            batch_norm_momentum=self.recipe.batch_norm_momentum,
            space_to_depth=self.recipe.space_to_depth,
            sync_batch_norm=self.recipe.sync_batch_norm,
        )

    def sums(self, model, batch, training):
        """See `models.resnet.classification_sums`."""
        return resnet.classification_sums(
            model, batch, training, label_smoothing=self.recipe.label_smoothing
        )

    def counts(self, batch):
        """See `models.resnet.classification_counts`."""
        return resnet.classification_counts(batch)

    def train_batches(self, phase_index, first_step):
        """Training images, augmented as the recipe says."""
        batch_size = self.recipe.phases[phase_index].global_batch_size
        return lambda context: self._source.training.training_batches(
            batch_size, context, first_step
        )

    def evaluation_batches(self, phase_index):
        """Center crops of held-out images, see `Images.evaluation_batches`."""
        batch_size = self.recipe.phases[phase_index].global_batch_size
        return lambda context: self._source.held_out.evaluation_batches(
            batch_size, self.recipe.evaluation_examples, context
        )

    def order(self, phase_index):
        """See `tasks.task.Task.order`."""
        return self._source.training.order(self.recipe.phases[phase_index].global_batch_size)

    def files_read(self, phase_index, context, steps):
        """See `tasks.task.Task.files_read`."""
        batch_size = self.recipe.phases[phase_index].global_batch_size
        return self._source.training.files_read(batch_size, context, steps)

    def damage(self):
        """See `tasks.task.Task.damage`."""
        return self._source.damage

    def describe(self, results):
        """Top-1 and top-5 accuracy, and the loss."""
        return (
            f"top-1 accuracy {results['image_top1']:.4f}, top-5 {results['image_top5']:.4f}, "
            f"loss {results['image_loss']:.4f}"
        )

    def export(self, model, export_dir, results, steps=None):
        """Writes a SavedModel that classifies image files."""
        card = make_card(self, model.count_params(), results, USAGE, steps)
        export = classifier_export(
            model, self._source.classes, self.recipe.image_size, self._source.centre_share
        )
        write_export(export, card, export_dir)

    def demonstrate(self, export_dir):
        """Prints the SavedModel's predictions for held-out images, if there are any."""
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for data, class_name in self._source.sample_files(SHOWN_IMAGES):
                name = f"{len(paths)} {class_name.replace(os.sep, ' ')}"
                paths.append(os.path.join(folder, name))
                with open(paths[-1], "wb") as file:
                    file.write(data)
            if paths:
                print(
                    "Held-out images, classified by the SavedModel in a separate process:",
                    flush=True,
                )
                run_client(export_dir, *paths)


class _Images:
    """Prepared images: the splits train/ and validation/ of a folder."""

    def __init__(self, recipe, data_dir, seed, log, reports):
        if not data_dir:
            raise InputError(
                "--data_dir: give the folder that `python -m inputs.images.prepare` wrote, or "
                "--synthetic."
            )

        def read(split, augmentation, mixup_alpha):
            return examples.Images(
                os.path.join(data_dir, split),
                recipe.image_size,
                seed=seed,
                augmentation=augmentation,
                mixup_alpha=mixup_alpha,
                bad_records=reports.bad_records(recipe),
                lanes=recipe.lanes,
                damage_folder=reports.folder_of(split),
            )

        self.description = data_dir
        self.training = read("train", recipe.augmentation, recipe.mixup_alpha)
        self.held_out = read("validation", "none", 0.0)
        self.damage = [self.training.damage, self.held_out.damage]
        self.classes = self.training.manifest["classes"]
        check_same_classes(
            self.classes,
            self.held_out.manifest["classes"],
            os.path.join(data_dir, "train"),
            os.path.join(data_dir, "validation"),
        )
        self.centre_share = self.held_out.centre_share
        hashes = self.training.manifest["hash"] + self.held_out.manifest["hash"]
        self.fingerprint = hashlib.sha256(hashes.encode()).hexdigest()[:16]
        self.training_examples = self.training.num_examples
        self.amount = (
            f"{self.training.num_examples:,} images of {len(self.classes):,} classes to train on, "
            f"{self.held_out.num_examples:,} held out"
        )
        log(self.amount)

    def sample_files(self, count):
        """Yields (bytes of an image file, name of its class)."""
        for data, label in self.held_out.files(count):
            yield data, self.classes[label][1]


class _SyntheticImages:
    """Random pixels."""

    description = fingerprint = amount = synthetic_data.DESCRIPTION
    centre_share = 1.0
    training_examples = 1_281_167  # those of ImageNet
    damage = ()

    def __init__(self, recipe, seed):
        count = CIFAR10_CLASSES if recipe.normalization == "cifar10" else IMAGENET_CLASSES
        self.classes = [(f"class{i}", f"class{i}") for i in range(count)]
        self.training = self.held_out = synthetic_data.SyntheticExamples(
            lambda size: examples.element_spec(size, recipe.image_size),
            {"image": 256, "label": count},
            seed,
        )

    def sample_files(self, count):
        return ()
