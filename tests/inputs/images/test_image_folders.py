"""Folders of pictures as people have them: left-overs, links, formats, splits, replaced files."""

import io
import json
import os
import pathlib
import re
import shutil
import struct

import numpy as np
import PIL.ExifTags
import PIL.Image
import pytest
import tensorflow as tf
from pictures import NAMES, class_folders, encoded, manifest, prepare, smooth, stored

from inputs.errors import InputError
from inputs.images import conversion, shards, sources
from inputs.storage.files import locked

JPEG = encoded(smooth(8, 8))


def put(folder, *names, data=JPEG):
    """Writes the same picture under each name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def run(source, *flags):
    """Prepares into out/; returns the manifest of the train split."""
    assert prepare("--source", source, "--output", "out", *flags) == 0
    return manifest(pathlib.Path("out/train"))


def names_of(facts):
    return [name for _, name in facts["classes"]]


def test_left_overs_are_no_classes_and_no_pictures(tmp_path, capsys):
    source = put(tmp_path / "source", "cat/1.jpg", "dog/1.jpg", "cat/._1.jpg", "dog/Thumbs.db")
    put(source, ".ipynb_checkpoints/1.jpg", "__MACOSX/cat/1.jpg", "dog/.ipynb_checkpoints/1.jpg")
    facts = run(source)
    assert (names_of(facts), facts["class_counts"]) == (["cat", "dog"], [1, 1])
    assert "--source, train split: 5 passed over: 5 × hidden" in capsys.readouterr().err


def test_every_picture_of_a_class_is_read_and_the_rest_is_said(tmp_path, capsys):
    """In folders below, through links, in upper case, and in formats of other programs."""
    source = tmp_path / "source"
    put(source, "cat/1.JPG", "cat/2.jfif", "cat/session/3.jpeg", "dog/a.jpg", "dog/a.xml", "x.csv")
    put(tmp_path / "more", "4.jpg")
    (source / "cat/link").symlink_to(tmp_path / "more")
    (source / "cat/session/up").symlink_to(source / "cat")
    (source / "owl").symlink_to(tmp_path / "more")
    facts = run(source)
    assert (names_of(facts), facts["class_counts"]) == (["cat", "dog", "owl"], [4, 1, 1])
    assert "2 passed over: 1 × .csv, 1 × .xml" in capsys.readouterr().err


FORMATS = {"a.webp": "WEBP", "a.tif": "TIFF", "a.tiff": "TIFF", "a.bmp": "BMP", "a.ppm": "PPM"}


def test_formats_that_tensorflow_lacks_become_png(tmp_path, capsys):
    pixels = smooth(20, 30)
    for name, kind in FORMATS.items():
        file = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        PIL.Image.fromarray(pixels).save(file, kind, **options)
        put(tmp_path / "source", f"cat/{name}", data=file.getvalue())
    (tmp_path / "source/cat/broken.ppm").write_bytes(file.getvalue()[:40])
    facts = run(tmp_path / "source")
    assert facts["count"] == 5
    assert [damaged["name"][-10:] for damaged in facts["damaged"]] == ["broken.ppm"]
    assert "truncated" in facts["damaged"][0]["reason"]
    for data, _ in stored(pathlib.Path("out/train")):
        np.testing.assert_array_equal(tf.io.decode_image(data, 3, expand_animations=False), pixels)
    said = capsys.readouterr().err
    assert (
        "stored as PNG, because TensorFlow does not decode them correctly: 2 × TIFF, 1 × PPM"
        in said
    )


def test_deep_pixels_keep_their_upper_bits_and_floats_are_refused():
    grey = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    PIL.Image.fromarray(grey).save(file, "TIFF")
    png, kind = conversion.to_png(file.getvalue())
    assert kind == "TIFF"
    np.testing.assert_array_equal(tf.io.decode_png(png)[..., 0], grey >> 8)
    file = io.BytesIO()
    PIL.Image.fromarray(grey.astype(np.float32)).save(file, "TIFF")
    with pytest.raises(ValueError, match="32-bit pixels"):
        conversion.to_png(file.getvalue())


def tiff(pixels, bits, photometric):
    """A TIFF of packed gray pixels, [H, W] uint16."""
    rows = [
        np.array([[value >> bit & 1 for bit in range(bits - 1, -1, -1)] for value in row], np.uint8)
        for row in pixels
    ]
    data = np.packbits(rows).tobytes() if bits == 12 else pixels.astype("<u2").tobytes()
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + bytes([len(tags), 0]) + entries


DEEP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize(
    ("data", "exact"),
    [
        (tiff(DEEP >> 4, 12, 1) + bytes(4), DEEP >> 8),
        (tiff(DEEP, 16, 1) + bytes(4), DEEP >> 8),
        (tiff(DEEP, 16, 0) + bytes(4), 255 - (DEEP >> 8)),  # 0 is white
        (b"P5\n16 16\n65535\n" + DEEP.astype(">u2").tobytes(), DEEP >> 8),
    ],
)
def test_gray_of_12_and_16_bits(data, exact):
    stored, *_, error = conversion.check_image(data)
    assert error == ""
    np.testing.assert_array_equal(tf.io.decode_png(stored)[..., 0], exact)


def bmp(picture, *, masks=()):
    """A BMP, with 32 bits per pixel and bit fields if there are masks of red, green and blue."""
    if not masks:
        file = io.BytesIO()
        picture.save(file, "BMP")
        return file.getvalue()
    colors = np.asarray(picture)[::-1, :, ::-1]
    data = np.dstack([np.full(colors.shape[:2], 255, np.uint8), colors]).tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, *picture.size, 1, 32, 3, len(data), 0, 0, 0, 0)
    header += struct.pack("<III", *masks)
    return b"BM" + struct.pack("<IHHI", 66 + len(data), 0, 0, 66) + header + data


@pytest.mark.parametrize("kind", ["24 bits", "palette", "gray", "1 bit", "bit fields"])
def test_a_bmp_keeps_its_colors(kind):
    """TensorFlow takes the indices of a palette for brightness, and ignores bit fields."""
    picture = PIL.Image.fromarray(smooth(20, 31))
    masks = (0xFF000000, 0xFF0000, 0xFF00) if kind == "bit fields" else ()
    if kind in ("palette", "gray", "1 bit"):
        picture = {
            "palette": picture.quantize(64),
            "gray": picture.convert("L"),
            "1 bit": picture.convert("1"),
        }[kind]
    stored, height, width, converted, error = conversion.check_image(bmp(picture, masks=masks))
    assert (height, width, error) == (20, 31, "")
    assert converted == ("" if kind == "24 bits" else "BMP")
    decoded = tf.io.decode_image(stored, channels=3)
    np.testing.assert_array_equal(decoded, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "AVIF"])
def test_no_format_is_turned(kind):
    """TensorFlow ignores the orientation in a JPEG, so that of the others is ignored, too."""
    pixels = smooth(20, 32)
    exif = PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, exif=exif)
    stored, height, width, *_ = conversion.check_image(file.getvalue())
    assert (height, width) == (20, 32)
    decoded = tf.io.decode_image(stored, channels=3).numpy().astype(int)
    assert np.abs(decoded - pixels).mean() < 9


def test_every_listed_suffix_can_be_decoded():
    """The suffixes of sources.py against the formats that this Pillow opens."""
    PIL.Image.init()
    known = PIL.Image.registered_extensions()
    assert {known[suffix] for suffix in sources.SUFFIXES} <= set(PIL.Image.OPEN) | {"JPEG"}


@pytest.mark.parametrize(
    ("train", "validation"),
    [("Train", "Val"), ("training_set", "test_set"), ("TRAIN", "valid"), ("train", "test")],
)
def test_names_of_splits(tmp_path, train, validation):
    class_folders(tmp_path / "source" / train, per_class=2)
    class_folders(tmp_path / "source" / validation, per_class=1)
    (tmp_path / "source/.git").mkdir()
    assert run(tmp_path / "source")["class_counts"] == [2, 2, 2]
    assert manifest(pathlib.Path("out/validation"))["class_counts"] == [1, 1, 1]


def test_a_test_split_beside_validation_is_passed_over_with_a_line(tmp_path, capsys):
    for split in ("train", "val", "test"):
        class_folders(tmp_path / "source" / split, per_class=1)
    put(tmp_path / "source", "annotations/a.xml")
    run(tmp_path / "source")
    said = capsys.readouterr().err
    assert f"{tmp_path}/source/test is passed over" in said
    assert f"{tmp_path}/source/annotations is passed over" in said


@pytest.mark.parametrize(
    ("name", "flags", "split"),
    [
        ("val", (), "validation"),
        ("Test", (), "validation"),
        ("val", ("--split=train",), "train"),
        ("train", (), "train"),
        ("photos", (), "train"),
    ],
)
def test_a_folder_named_after_a_split_is_that_split(tmp_path, capsys, name, flags, split):
    source = put(tmp_path / name, "cat/1.jpg", "dog/1.jpg")
    assert prepare("--source", f"{source}/", "--output", "out", *flags) == 0
    assert [path.name for path in pathlib.Path("out").iterdir()] == [split]
    assert ("taken as the validation split" in capsys.readouterr().err) == (split == "validation")


def test_the_advice_to_give_one_split_works(tmp_path, capsys):
    for split in ("train", "val"):
        put(tmp_path / "source", f"{split}/cat/1.jpg", f"{split}/dog/1.jpg")
    put(tmp_path / "source", "train/cover.jpg")
    assert prepare("--source", tmp_path / "source", "--output", "out") == 1
    advised = re.search(r"such as --source=(.*)\.$", capsys.readouterr().err.strip())
    assert prepare("--source", advised[1], "--output", "out") == 0
    assert manifest(pathlib.Path("out/validation"))["count"] == 2


def test_a_class_whose_name_is_not_utf8_is_refused(tmp_path, capsys):
    """No model could return it."""
    folder = os.path.join(os.fsencode(tmp_path / "source"), b"caf\xe9")
    os.makedirs(folder)
    with open(os.path.join(folder, b"1.jpg"), "wb") as file:
        file.write(JPEG)
    assert prepare("--source", tmp_path / "source", "--output", "out") == 1
    assert r"the name of the class 'caf\udce9' is not UTF-8" in capsys.readouterr().err
    assert not pathlib.Path("out").exists()


def test_an_output_inside_of_the_source_is_refused(tmp_path, capsys):
    """The second run would take it for a class."""
    source = put(tmp_path / "source", "cat/1.jpg")
    (tmp_path / "link").symlink_to(source)
    for output in (source, source / "out", tmp_path / "link/out"):
        assert prepare("--source", source, "--output", output) == 1
        assert "is inside of --source" in capsys.readouterr().err
    assert [path.name for path in source.iterdir()] == ["cat"]
    assert prepare("--source", source, "--output", tmp_path / "source-2") == 0


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    """CIFAR-100 has the class train."""
    put(tmp_path / "source", "train/1.jpg", "cat/1.jpg")
    assert names_of(run(tmp_path / "source")) == ["cat", "train"]


BAD = {
    "one folder too high": (
        ["PetImages/cat/1.jpg", "PetImages/dog/1.jpg"],
        "one class folder, PetImages, .* Give --source=.*/source/PetImages.",
    ),
    "two folders too high": (
        ["seg_a/cat/1.jpg", "seg_a/dog/1.jpg", "seg_b/cat/1.jpg", "seg_b/dog/1.jpg"],
        "folders seg_a, seg_b, and each has cat and dog below it",
    ),
    "splits without classes": (
        ["train/cat.0.jpg", "test/1.jpg"],
        "has no class folders, so the labels of its images are not known",
    ),
    "one split without classes": (
        ["train/cat/0.jpg", "val/1.jpg"],
        "val has no class folders, so .* for ImageNet, put LOC_val_solution.csv or",
    ),
    "classes beside a split": (["train/cat/0.jpg", "dog/1.jpg"], "/dog has images that are in no"),
    "pictures alone": (["1.jpg"], "has no class folders, so the labels"),
}


@pytest.mark.parametrize("case", BAD)
def test_folders_that_do_not_tell_the_labels_are_refused(tmp_path, capsys, case):
    files, said = BAD[case]
    source = put(tmp_path / "source", *files)
    assert prepare("--source", source, "--output", "out") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line)
    assert not list(tmp_path.glob("out/*/manifest.json"))


def test_with_a_class_list_the_depth_is_not_guessed(tmp_path):
    (tmp_path / "classes.csv").write_text("index,wnid,name\n0,a,A\n1,b,B\n")
    put(tmp_path / "source", "a/2020/1.jpg", "a/2021/1.jpg", "b/2020/1.jpg", "b/2021/1.jpg")
    facts = run(tmp_path / "source", "--classes", tmp_path / "classes.csv")
    assert facts["class_counts"] == [2, 2]


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A source of three pictures whose preparation stopped after the first of three shards."""
    source = class_folders(tmp_path / "source", per_class=1)
    monkeypatch.setattr(sources, "IMAGES_PER_PART", 1)
    with monkeypatch.context() as patch:
        write = shards.write_shard

        def stops(folder, name, *rest):
            if name.endswith("1"):
                raise KeyboardInterrupt
            return write(folder, name, *rest)

        patch.setattr(shards, "write_shard", stops)
        assert prepare("--source", source, "--output", "out") == 130
    return source


def test_a_replaced_picture_is_noticed(stopped, capsys):
    """Under the same name, with the same size."""
    path = stopped / f"{NAMES[2]}/0.jpg"
    old = path.read_bytes()
    path.write_bytes(bytes(len(old)))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert prepare("--source", stopped, "--output", "out") == 1
    said = capsys.readouterr().err
    assert "--source has other files than when out/train was begun: they were added" in said
    assert not pathlib.Path("out/train/manifest.json").exists()


def test_an_unchanged_source_continues(stopped, monkeypatch):
    monkeypatch.chdir(stopped.parent)
    assert prepare("--source", "source", "--output", "out") == 0  # by a relative path, this time
    assert manifest(pathlib.Path("out/train"))["count"] == 3


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (cut, "train-00000.tfrecord"),
        (pathlib.Path.unlink, "train-00000.tfrecord"),
        (empty, "train-00000.tfrecord.json"),
        (lambda path: path.write_text('{"file": 1}'), "train-00000.tfrecord.json"),
    ],
)
def test_a_finished_shard_that_is_damaged_is_written_again(stopped, capsys, change, name):
    change(pathlib.Path("out/train", name))
    assert run(stopped)["count"] == 3
    said = capsys.readouterr().err
    assert said.count("is damaged or missing, and is written again") == 1
    assert len(stored(pathlib.Path("out/train"))) == 3


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (cut, "train-00001.tfrecord"),
        (pathlib.Path.unlink, "train-00001.tfrecord"),
        (shutil.rmtree, "index"),
        (cut, "index/index"),
        (empty, "index/arrays.json"),
    ],
)
def test_a_finished_folder_is_repaired(stopped, capsys, change, name):
    facts = run(stopped)
    before = stored(pathlib.Path("out/train"))
    change(pathlib.Path("out/train", name))
    with pytest.raises(InputError, match="again"):
        shards.open_images("out/train")
    assert run(stopped) == facts
    said = capsys.readouterr().err
    assert ("00001.tfrecord is damaged or missing, and is" in said) == ("tfrecord" in name)
    assert "out/train was finished already, and is repaired" in said
    assert stored(pathlib.Path("out/train")) == before
    assert run(stopped) == facts
    assert "out/train is finished already" in capsys.readouterr().err


def test_a_folder_of_another_command_is_not_taken_for_finished(stopped, capsys):
    facts = run(stopped)
    del facts["plan"]
    pathlib.Path("out/train/manifest.json").write_text(json.dumps(facts))
    assert prepare("--source", stopped, "--output", "out") == 1
    assert "out/train was not made by this command" in capsys.readouterr().err
    empty(pathlib.Path("out/train/manifest.json"))
    assert prepare("--source", stopped, "--output", "out") == 1
    assert "Delete out/train and run the same command again" in capsys.readouterr().err


def test_two_at_once_are_refused(stopped, capsys):
    with locked("out/train", "--output"):
        assert prepare("--source", stopped, "--output", "out") == 1
    assert "--output: out/train is in use by process" in capsys.readouterr().err
    run(stopped)
    with locked("out/train", "--output"):  # nothing is written there any more
        assert run(stopped)["count"] == 3
