"""Reads the files that list ImageNet's classes and the labels of its validation images."""

import os
from collections.abc import Iterable

from inputs.errors import InputError
from inputs.images.sources import Class, read_csv
from inputs.storage.files import absolute, is_file, read_file

# Kaggle's list has the columns ImageId and PredictionString ("n03995372 85 1 499 272 ...": for each
# object a WordNet id and a box). The list of the TPU demos has a WordNet id per line.
KAGGLE_LABELS = "LOC_val_solution.csv"
DEMO_LABELS = "imagenet_2012_validation_synset_labels.txt"
LABELS = (KAGGLE_LABELS, DEMO_LABELS)
KAGGLE_CLASSES = "LOC_synset_mapping.txt"  # Kaggle's: "n01440764 tench, Tinca tinca"
KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # below what Kaggle's archive unpacks to
TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
CLS_LOC = "CLS-LOC"
CLS_LOC_PARENTS = 4  # from CLS-LOC/val to the files of Kaggle's archive


def find_labels(folder: str) -> dict[str, str] | None:
    """The WordNet ids of the validation images, by file name without suffix.

    Args:
        folder: folder of the images. The file of labels is searched in it, in its parent, and above
            CLS-LOC.

    Returns:
        File name without suffix -> WordNet id; None if there is no file of labels.

    Raises:
        InputError: the file cannot be read.
    """
    path = _search(folder, KAGGLE_LABELS, parents=1)
    if path:
        rows = read_csv(path, ("ImageId", "PredictionString"))
        return {row["ImageId"]: row["PredictionString"].split(" ")[0] for _, row in rows}
    path = _search(folder, DEMO_LABELS, parents=1)
    if path:
        return {f"ILSVRC2012_val_{i:08d}": w for i, w in enumerate(_lines(path), start=1)}
    return None


def find_classes(folder: str) -> list[Class] | None:
    """The classes of Kaggle's list in a folder, or above CLS-LOC; None if there is none."""
    path = _search(folder, KAGGLE_CLASSES, parents=0)
    if not path:
        return None
    pairs = [line.partition(" ") for line in _lines(path)]
    return [Class(wnid, name.strip() or wnid) for wnid, _, name in pairs]


def sorted_classes(wnids: Iterable[str]) -> list[Class]:
    """The classes with these WordNet ids, in ImageNet's order of labels, which is alphabetical."""
    return [Class(wnid, wnid) for wnid in sorted(set(wnids))]


def _search(folder, name, parents) -> str:
    folder = absolute(folder)
    if CLS_LOC in folder.split(os.sep):
        parents = CLS_LOC_PARENTS
    for _ in range(parents + 1):
        path = os.path.join(folder, name)
        if is_file(path):
            return path
        folder = os.path.dirname(folder)
    return ""


def _lines(path) -> list[str]:
    try:
        lines = read_file(path).decode("utf-8-sig").split("\n")
        return [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--source: {path} cannot be read as UTF-8 ({error}).") from None
