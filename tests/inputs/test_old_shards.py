"""Shards of earlier versions still open.

tests/data/shards/files.zip holds three folders written at commit ae1789d: `text`, by
`python -m inputs.text.prepare`; and `photos` (JPEG files) and `pixels` (CIFAR-10), by
`python -m inputs.images.prepare`. They must not be written again by a later version.
"""

import pathlib
import zipfile

import numpy as np
import pytest
from pictures import smooth

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.images import examples
from inputs.images import prepare as prepare_images
from inputs.text.corpus import load_prepared
from inputs.text.prepare import prepare

FILES = pathlib.Path(__file__).parents[1] / "data/shards/files.zip"
TEXT = """\
went on cat to mat on a to sat .
mat fish the tree .
to mat the log dog .
the on tree .
log sat sat tree bird log .
on fish a log cat the .
the a tree log a sat .
sat on bird log fish to a went .
"""


@pytest.fixture
def folder(tmp_path):
    with zipfile.ZipFile(FILES) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def strict():
    return BadRecords(0.0, skip=False, log=print)


def documents(corpus, vocabulary):
    bounds = corpus.sentences.all()[corpus.documents.all()]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        yield " ".join(vocabulary[i] for i in corpus.tokens.all()[start : end - 1])


def test_text(folder):
    training, held_out, vocabulary, fingerprint = load_prepared(str(folder / "text"), "", strict())
    assert fingerprint == "107b23d311931eab"
    assert [len(side.documents) - 1 for side in (training, held_out)] == [6, 2]
    found = [*documents(training, vocabulary), *documents(held_out, vocabulary)]
    assert sorted(found) == sorted(TEXT.splitlines())


def test_a_finished_preparation_of_text_is_recognised(folder):
    text = TEXT.replace(" .", ".").strip().replace("\n", "\n\n")
    (folder / "a.txt").write_text(text)
    said = []
    output = str(folder / "text")
    prepare(str(folder / "a.txt"), f"{output}/vocab.txt", output, workers=0, log=said.append)
    assert said == ["1 finished shards were verified and kept", f"{output} is finished already"]


def converted(folder, name):
    """The images of a folder, which are refused with the command that converts them."""
    with pytest.raises(InputError, match=f"--source={folder / name} --output=NEW_FOLDER"):
        examples.Images(str(folder / name / "validation"), 32, seed=1)
    assert prepare_images.main([f"--source={folder / name}", f"--output={folder / 'new'}"]) == 0
    return folder / "new"


def test_image_files(folder):
    data = examples.Images(str(converted(folder, "photos") / "validation"), 16, seed=1)
    assert data.manifest["classes"] == [["cat", "cat"], ["dog", "dog"]]
    (batch,) = data.evaluation_batches(2, 2)
    assert batch["label"].numpy().tolist() == [0, 1]
    for image, (file, label) in zip(batch["image"].numpy(), data.files(2), strict=True):
        assert file.startswith(b"\xff\xd8")
        # The center of 16 x 20 pixels, scaled by 1.5, differs a little from the whole.
        difference = image.astype(int).mean() - smooth(16, 20, seed=label).astype(int).mean()
        assert abs(difference) < 3


def test_raw_pixels(folder):
    data = examples.Images(
        str(converted(folder, "pixels") / "validation"), 32, seed=1, augmentation="none"
    )
    (batch,) = data.evaluation_batches(2, 2)
    assert batch["label"].numpy().tolist() == [0, 1]
    rng = np.random.default_rng(len("test") + ord("t"))
    blocks = rng.integers(0, 256, [8, 4, 3], dtype=np.uint8)
    expected = blocks.repeat(8, 0).repeat(8, 1).reshape(2, 32, 32, 3)
    np.testing.assert_array_equal(batch["image"], expected)
