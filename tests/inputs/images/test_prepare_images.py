"""Preparing images from every published layout, and the messages about mistakes."""

import pathlib
import pickle
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from pictures import (
    NAMES,
    class_folders,
    encoded,
    example,
    manifest,
    prepare,
    smooth,
    stored,
)

from inputs.errors import InputError
from inputs.images import shards
from inputs.images.shards import open_images

SHARED = pathlib.Path(__file__).parents[4] / "shared/data"
CLASSES = "index,wnid,name\n" + "".join(f"{i},n{i},{name}\n" for i, name in enumerate(NAMES))


def demo_example(data, label, **more):
    return example(image__encoded=data, image__class__label=label, **more)


def write_records(folder, files, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, records in enumerate(files):
        name = f"{split}-{number:05d}-of-{len(files):05d}"
        with tf.io.TFRecordWriter(str(folder / name)) as writer:
            for record in records:
                writer.write(record)
    return folder


def test_class_folders_with_both_splits(tmp_path, capsys):
    for split, count in (("train", 3), ("val", 2)):
        class_folders(tmp_path / "source" / split, per_class=count)
    assert prepare("--source", tmp_path / "source", "--output", tmp_path / "out") == 0
    train, validation = (manifest(tmp_path / "out" / s) for s in ("train", "validation"))
    assert (train["count"], validation["count"]) == (9, 6)
    assert train["class_counts"] == [3, 3, 3]
    assert [name for _, name in train["classes"]] == list(NAMES)
    shown = capsys.readouterr()
    assert f"hash {train['hash']}" in shown.out
    assert shown.err.splitlines() == [
        f"{tmp_path}/out/{split}/{split}-00000.tfrecord: {count} images (100%)"
        for split, count in (("train", 9), ("validation", 6))
    ]
    first = (tmp_path / "source/train/cat/0.jpg").read_bytes()
    assert stored(tmp_path / "out/train")[0] == (first, 0)


def test_a_tar_with_a_csv(tmp_path):
    (tmp_path / "classes.csv").write_text(CLASSES)
    files = [encoded(smooth(40, 50, seed=i)) for i in range(3)]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, data in enumerate(files):
            (tmp_path / f"{i}.jpg").write_bytes(data)
            archive.add(tmp_path / f"{i}.jpg", f"{i}.jpg")
    (tmp_path / "a.csv").write_text("file,wnid,index\n2.jpg,n2,2\n0.jpg,n0,0\n1.jpg,n1,1\n")
    assert prepare("--source", tmp_path / "a.tar", "--output", tmp_path / "out") == 0
    assert stored(tmp_path / "out/train") == [(files[2], 2), (files[0], 0), (files[1], 1)]


@pytest.mark.parametrize("layout", ["TPU demo", "TPU demo, a folder for each split", "TFDS"])
def test_tfrecords_in_both_layouts(tmp_path, layout):
    """Labels start at 1 in one and at 0 in the other; both become the same shards."""
    files = [encoded(smooth(40, 50, seed=i)) for i in range(4)]
    if layout == "TFDS":
        records = [example(image=f, label=i % 3, file_name=b"x.JPEG") for i, f in enumerate(files)]
    else:
        records = [
            demo_example(f, i % 3 + 1, image__class__synset=f"n{i % 3}".encode())
            for i, f in enumerate(files)
        ]
    source = tmp_path / "source"
    write_records(source / "train" if "folder" in layout else source, [records[:2], records[2:]])
    if layout == "TFDS":
        (source / "label.labels.txt").write_text("n0\nn1\nn2\n")
    assert prepare("--source", source, "--output", tmp_path / "out") == 0
    assert stored(tmp_path / "out/train") == [(f, i % 3) for i, f in enumerate(files)]
    assert [wnid for wnid, _ in manifest(tmp_path / "out/train")["classes"]] == ["n0", "n1", "n2"]


def cifar_images(count=4):
    images = np.random.default_rng(0).integers(0, 256, [count, 32, 32, 3], dtype=np.uint8)
    return images, np.arange(count) % 10


@pytest.mark.parametrize("kind", ["python", "python archive", "binary", "strips"])
def test_cifar_in_every_form(tmp_path, kind):
    pixels, labels = cifar_images()
    folder = tmp_path / "cifar"
    folder.mkdir()
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    for i in range(6):
        if kind.startswith("python"):
            name = f"data_batch_{i + 1}" if i < 5 else "test_batch"
            content = pickle.dumps({b"data": rows, b"labels": labels.tolist()})
        elif kind == "binary":
            name = f"data_batch_{i + 1}.bin" if i < 5 else "test_batch.bin"
            content = np.concatenate([labels[:, None], rows], 1).astype(np.uint8).tobytes()
        else:
            name = f"train-{i}.png" if i < 5 else "test.png"
            content = encoded(pixels.reshape(-1, 32, 3), "PNG")
        (folder / name).write_bytes(content)
    np.savez(folder / "labels.npz", y_train=np.tile(labels, 5), y_test=labels)
    source = folder
    if kind == "python archive":
        source = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(source, "w:gz") as archive:
            archive.add(folder, "cifar-10-batches-py")
    assert prepare("--source", source, "--output", tmp_path / "out") == 0
    assert manifest(tmp_path / "out/train")["pixels"] == [32, 32, 3]
    expected = [(image.tobytes(), label) for image, label in zip(pixels, labels, strict=True)]
    assert stored(tmp_path / "out/validation") == expected
    assert stored(tmp_path / "out/train") == 5 * expected


def test_a_pickle_with_code_is_not_run(tmp_path, capsys):
    class Program:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "run",)

    (tmp_path / "source").mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / "source" / name).write_bytes(pickle.dumps(Program()))
    assert prepare("--source", tmp_path / "source", "--output", tmp_path / "out") == 1
    assert "data_batch_1 is not CIFAR-10" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stopped_preparation_continues(tmp_path, monkeypatch):
    """Only the unfinished shard is written again, and the result is the same."""
    records = [demo_example(encoded(smooth(40, 50, seed=i)), i + 1) for i in range(3)]
    source = write_records(tmp_path / "source", [[record] for record in records])
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert prepare("--source", source, "--output", whole) == 0
    write = shards.write_shard

    def stops(folder, name, records, facts):
        if name.endswith("2"):
            (pathlib.Path(folder) / f"{name}.tfrecord.new").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(folder, name, records, facts)

    monkeypatch.setattr(shards, "write_shard", stops)
    assert prepare("--source", source, "--output", part) == 130
    with pytest.raises(InputError, match="is not finished"):
        open_images(str(part / "train"))
    monkeypatch.undo()
    finished = part / "train/train-00000.tfrecord"
    before = finished.stat().st_mtime_ns
    assert prepare("--source", source, "--output", part) == 0
    assert finished.stat().st_mtime_ns == before
    assert manifest(part / "train") == manifest(whole / "train")
    assert stored(part / "train") == stored(whole / "train")
    assert sorted(p.name for p in (part / "train").iterdir()) == sorted(
        p.name for p in (whole / "train").iterdir()
    )


def test_damaged_images_are_named_and_left_out(tmp_path, capsys):
    source = class_folders(tmp_path / "source")
    good = (source / "dog/1.jpg").read_bytes()
    (source / "dog/1.jpg").write_bytes(good[: len(good) // 2])
    (source / "owl/0.jpg").write_bytes(b"no image")
    assert prepare("--source", source, "--output", tmp_path / "out") == 0
    said = capsys.readouterr().err
    facts = manifest(tmp_path / "out/train")
    named = [damaged["name"] for damaged in facts["damaged"]]
    assert named == [str(source / "dog/1.jpg"), str(source / "owl/0.jpg")]
    assert all(name in said for name in named)
    assert (facts["count"], facts["class_counts"]) == (10, [4, 3, 3])


def test_the_file_name_does_not_decide_the_format(tmp_path):
    """ImageNet has a PNG and some CMYK images among its JPEGs."""
    folder = tmp_path / "source/cat"
    folder.mkdir(parents=True)
    for i, (kind, mode) in enumerate([("PNG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L")]):
        (folder / f"{i}.JPEG").write_bytes(encoded(smooth(40, 50), kind, mode))
    assert prepare("--source", tmp_path / "source", "--output", tmp_path / "out") == 0
    facts = manifest(tmp_path / "out/train")
    assert (facts["count"], facts["damaged"]) == (3, [])


def test_a_finished_folder_accepts_only_its_own_source(tmp_path, capsys):
    source, other = tmp_path / "source", tmp_path / "other"
    class_folders(source)
    class_folders(other, per_class=2)
    assert prepare("--source", source, "--output", tmp_path / "out") == 0
    before = manifest(tmp_path / "out/train")
    assert prepare("--source", source, "--output", tmp_path / "out") == 0
    assert "is finished already" in capsys.readouterr().err
    assert prepare("--source", other, "--output", tmp_path / "out") == 1
    assert "out/train was made with other values of: source, files" in capsys.readouterr().err
    (source / "cat/0.jpg").unlink()
    assert prepare("--source", source, "--output", tmp_path / "out") == 1
    assert "has other files than when" in capsys.readouterr().err
    class_folders(source, names=("ant",))
    assert prepare("--source", source, "--output", tmp_path / "out") == 1
    assert "has other files and classes than when" in capsys.readouterr().err
    assert manifest(tmp_path / "out/train") == before


def test_the_suggested_label_base_works(tmp_path, capsys):
    source = write_records(tmp_path / "source", [[demo_example(JPEG, i)] for i in (0, 1)])
    assert prepare("--source", source, "--output", tmp_path / "out") == 1
    assert "give --label_base=0" in capsys.readouterr().err
    assert prepare("--source", source, "--output", tmp_path / "out", "--label_base", 0) == 0
    assert manifest(tmp_path / "out/train")["class_counts"] == [1, 1]


def test_a_test_split_does_not_replace_validation(tmp_path):
    source = tmp_path / "source"
    for split, labels in (("train", (0, 1)), ("validation", (1, 0)), ("test", (-1,))):
        write_records(source, [[example(image=JPEG, label=i)] for i in labels], split)
    (source / "label.labels.txt").write_text("brown bear\npolar bear\n")
    assert prepare("--source", source, "--output", tmp_path / "out") == 0
    assert [label for _, label in stored(tmp_path / "out/validation")] == [1, 0]
    assert manifest(tmp_path / "out/train")["classes"][0][1] == "brown bear"


JPEG = encoded(smooth(8, 8))


def _one_record(record, files=1):
    return lambda folder: write_records(folder, [[record]] * files)


def _bad_csv(line):
    def make(folder):
        folder.mkdir()
        (folder / "classes.csv").write_text(CLASSES)
        (folder / "a.csv").write_text(f"file,wnid,index\n{line}\n")
        (folder / "0.jpg").write_bytes(JPEG)
        with tarfile.open(folder / "a.tar", "w") as archive:
            archive.add(folder / "0.jpg", "0.jpg")
        return folder / "a.tar"

    return make


def _mixed(folder):
    synset = {"image__class__synset": b"n1"}
    return write_records(
        folder, [[demo_example(JPEG, 1, **synset)], [demo_example(JPEG, 2, **synset)]]
    )


def _empty_class(folder):
    class_folders(folder)
    (folder / "bat").mkdir()
    return folder


def _lost_file(folder):
    _one_record(demo_example(JPEG, 1), files=2)(folder)
    (folder / "train-00001-of-00002").unlink()
    return folder


def _cut_record(folder):
    _one_record(demo_example(JPEG, 1))(folder)
    path = folder / "train-00000-of-00001"
    path.write_bytes(path.read_bytes()[:-9])
    return folder


def _cut_second_record(folder, options=None):
    folder.mkdir()
    path = folder / "train-00000-of-00001"
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for image in (JPEG, np.random.default_rng(1).bytes(2_000)):  # which gzip does not shorten
            writer.write(demo_example(image, 1))
    path.write_bytes(path.read_bytes()[:-30])
    return folder


def _cut_gzip(folder):
    return _cut_second_record(folder, "GZIP")


def _broken_archive(folder):
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(__file__, "data_batch_1")
    whole = (folder / "cifar-10-python.tar.gz").read_bytes()
    (folder / "cifar-10-python.tar.gz").write_bytes(whole[: len(whole) // 2])
    return folder / "cifar-10-python.tar.gz"


def _cifar_files(content, names=("data_batch_1", "test_batch")):
    def make(folder):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(content)
        return folder

    return make


def _negative_label(folder):
    batch = {b"data": np.zeros([1, 3072], np.uint8), b"labels": [-1]}
    names = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    return _cifar_files(pickle.dumps(batch), names)(folder)


def _unreadable(folder):
    class_folders(folder)
    (folder / "cat/9.jpg").symlink_to(folder / "nowhere.jpg")
    return folder


def _values(**features):
    """A record in which a feature has several values, or values of another type."""
    kinds = {bytes: "bytes_list", int: "int64_list", float: "float_list"}
    example = tf.train.Example.FromString(demo_example(JPEG, 1))
    for name, values in features.items():
        feature = example.features.feature[f"image/{name.replace('__', '/')}"]
        feature.Clear()
        kind = kinds[type(values[0])] if values else "int64_list"
        getattr(feature, kind).SetInParent()
        getattr(feature, kind).value.extend(values)
    return _one_record(example.SerializeToString())


def _two_validations(folder):
    for name in ("train", "val", "validation"):
        class_folders(folder / name)
    return folder


BAD = {
    "a broken archive": (_broken_archive, r"tar.gz cannot be read as a tar"),
    "half of CIFAR-10": (
        _cifar_files(b"", ["test_batch"]),
        "lacks the file data_batch_1 of",
    ),
    "the other half": (
        _cifar_files(b"", [f"data_batch_{i}.bin" for i in range(1, 6)]),
        "lacks the file test_batch.bin of CIFAR-10",
    ),
    "two labels": (_values(class__label=[1, 2]), "0: image/class/label has 2 values; one is"),
    "no label": (_values(class__label=[]), "0: image/class/label has 0 values; one is"),
    "two images": (_values(encoded=[JPEG, JPEG]), "0: image/encoded has 2 values; one is"),
    "a label of bytes": (_values(class__label=[b"1"]), "is of the type bytes_list, not int64_list"),
    "a label of floats": (_values(class__label=[1.0]), "of the type float_list, not int64_list"),
    "no label for the image": (
        _one_record(demo_example(JPEG, -1)),
        "-1 is outside the labels 1 of this layout. A label below 0 often means that there is none",
    ),
    "a label of -1": (_negative_label, r"data_batch_1, label of image 0: -1 is outside"),
    "a link to nothing": (_unreadable, r"cat/9.jpg cannot be read \(No such file"),
    "two validation splits": (_two_validations, "has two validation splits"),
    "a gap in the labels": (
        lambda folder: write_records(folder, [[demo_example(JPEG, i) for i in (1, 2**40)]]),
        r"label 1099511627775 \(.*record 1 \(\)\), but not label 1",
    ),
    "nothing there": (lambda folder: folder, "does not exist"),
    "no images": (lambda folder: folder.mkdir() or folder, "a folder without images"),
    "an empty class": (_empty_class, "bat has no image"),
    "a label below": (
        _one_record(demo_example(JPEG, 0)),
        r"train-00000-of-00001, record 0, image/class/label: 0 is outside the labels 1",
    ),
    "other keys": (
        _one_record(example(picture=JPEG, label=1)),
        r"record 0 has neither 'image/encoded' and 'image/class/label' nor 'image' and 'label'; "
        "it has 'label', 'picture'",
    ),
    "mixed bases": (_mixed, "mix label bases|a class has two labels"),
    "a lost file": (_lost_file, "has 1 of the 2 train files"),
    "a cut file": (_cut_record, "record 0: the file is damaged from here on"),
    "a cut record": (_cut_second_record, r"record 1: .* from here on \(it ends [0-9,]+ bytes"),
    "a cut gzip": (_cut_gzip, r"record 1: the file is damaged from here on \([^{]*Copy it again"),
    "no example": (_one_record(b"\xff\xff"), "record 0 is not a tf.train.Example"),
    "a label beyond": (_bad_csv("0.jpg,n0,3"), r"a.csv, line 2, index: '3' is outside .* 0 to 2"),
    "another class": (_bad_csv("0.jpg,n0,1"), "count their labels differently"),
    "a lost member": (_bad_csv("9.jpg,n0,0"), r"line 2, file: '9.jpg' is not in"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_gives_one_clear_line(tmp_path, capsys, case):
    make, said = BAD[case]
    assert prepare("--source", make(tmp_path / "source"), "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("inputs.images.prepare: ")
    with pytest.raises(InputError, match=said):
        raise InputError(error)
    assert not list(tmp_path.glob("out/*/manifest.json"))


def test_both_splits_must_have_the_same_classes(tmp_path, capsys):
    class_folders(tmp_path / "source/train")
    class_folders(tmp_path / "source/val", names=("cat", "cow", "owl"))
    assert prepare("--source", tmp_path / "source", "--output", tmp_path / "out") == 1
    assert "label 1 is dog in the first and cow in the second" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # so that the advice, --classes, can be followed
    wnids = ("cat", "cow", "dog", "owl")
    lines = [f"{i},{wnid},{wnid}\n" for i, wnid in enumerate(wnids)]
    (tmp_path / "classes.csv").write_text("index,wnid,name\n" + "".join(lines))
    assert (
        prepare(
            *("--source", tmp_path / "source", "--output", tmp_path / "out"),
            *("--classes", tmp_path / "classes.csv"),
        )
        == 0
    )


def test_a_stray_picture_does_not_make_a_folder_cifar(tmp_path):
    source = class_folders(tmp_path / "source")
    (source / "test.png").write_bytes(encoded(smooth(8, 8), "PNG"))
    assert prepare("--source", source, "--output", tmp_path / "out") == 0
    assert manifest(tmp_path / "out/train")["count"] == 12


def test_an_output_with_other_content_is_not_changed(tmp_path, capsys):
    class_folders(tmp_path / "source")
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/notes.txt").write_text("mine")
    assert prepare("--source", tmp_path / "source", "--output", tmp_path / "out") == 1
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out/train").iterdir()] == ["notes.txt"]


def test_a_truncated_shard_is_refused(tmp_path):
    class_folders(tmp_path / "source")
    prepare("--source", tmp_path / "source", "--output", tmp_path / "out")
    shard = tmp_path / "out/train/train-00000.tfrecord"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"train-00000.tfrecord has \d+ bytes"):
        open_images(str(tmp_path / "out/train"))


def test_the_real_imagenet_samples(tmp_path):
    source = SHARED / "imagenet/samples.tar"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    assert prepare("--source", source, "--output", tmp_path) == 0
    facts = manifest(tmp_path / "train")
    assert (facts["count"], len(facts["classes"]), facts["damaged"]) == (220, 1000, [])
    assert sum(count == 1 for count in facts["class_counts"]) == 220
