"""TFRecords of ImageNet that are read in place, and the command that indexes them."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from pictures import encoded, example, manifest, prepare, smooth

from inputs import shards
from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.images import index, tfrecords
from inputs.images.examples import Images
from inputs.record_index import write_index
from inputs.shards import HEADER_BYTES, read_records, record_offsets

PICTURES = [encoded(smooth(16, 20, seed=i)) for i in range(7)]
CLASSES = "index,wnid,name\n0,a,A\n1,b,B\n2,c,C\n"
LABELS = [0, 2, 1, 1, 0, 2, 1]


def demo_record(i):
    """A record of the TPU demos, whose labels count from 1."""
    return example(
        image__encoded=PICTURES[i], image__class__label=LABELS[i] + 1, image__filename=b"x.JPEG"
    )


def tfds_record(i):
    return example(image=PICTURES[i], label=LABELS[i], file_name=b"x.JPEG")


def write(path, records, options=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path), options) as writer:
        for record in records:
            writer.write(record)
    return path


@pytest.fixture
def demo(tmp_path):
    """Two files of four and three images, one of validation, and the list of classes."""
    source = tmp_path / "source"
    write(source / "train-00000-of-00002", map(demo_record, range(4)))
    write(source / "train-00001-of-00002", map(demo_record, range(4, 7)))
    write(source / "validation-00000-of-00001", map(demo_record, range(3)))
    (tmp_path / "classes.csv").write_text(CLASSES)
    return source


def run(source, *flags, classes="classes.csv"):
    """Runs the command in this process; returns its exit status."""
    given = ["--classes", classes] if classes else []
    return index.main([f"--source={source}", "--output=out", *given, *map(str, flags)])


def evaluated(folder, count, **arguments):
    """(images, labels, weights) of an evaluation."""
    images = Images(str(folder), 16, seed=1, augmentation="none", **arguments)
    batches = [*images.evaluation_batches(4, count).as_numpy_iterator()]
    return [np.concatenate([batch[key] for batch in batches]) for key in sorted(batches[0])]


def test_the_images_are_those_of_a_converted_copy(demo, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.iterdir()}
    assert run(demo) == 0
    printed = capsys.readouterr().out
    assert "out/train: 7 images of 3 classes in 2 files" in printed
    assert "out/validation: 3 images of 3 classes in 1 files" in printed
    assert prepare("--source", demo, "--output", "copy", "--classes", "classes.csv") == 0
    for split, count in (("train", 7), ("validation", 3)):
        for ours, copied in zip(
            evaluated(f"out/{split}", count), evaluated(f"copy/{split}", count), strict=True
        ):
            np.testing.assert_array_equal(ours, copied)
    assert {path: path.stat().st_mtime_ns for path in demo.iterdir()} == before
    # The index and the manifest alone.
    assert sum(path.stat().st_size for path in demo.parent.glob("out/**/*") if path.is_file()) < 5e4


def test_training_has_each_image_once_per_epoch(demo):
    assert run(demo) == 0
    images = Images("out/train", 16, seed=3, augmentation="none")
    batches = images.training_batches(7).take(2).as_numpy_iterator()
    labels = [sorted(batch["label"].tolist()) for batch in batches]
    assert labels == [sorted(LABELS)] * 2


def test_the_layout_of_tensorflow_datasets(tmp_path):
    """Its own list of classes serves; nobody says which label is the first."""
    source = tmp_path / "tfds"
    write(source / "imagenet2012-train.tfrecord-00000-of-00001", map(tfds_record, range(7)))
    write(source / "imagenet2012-validation.tfrecord-00000-of-00001", map(tfds_record, range(2)))
    (source / "label.labels.txt").write_text("a\nb\nc\n")
    assert run(source, classes=None) == 0
    assert manifest(tmp_path / "out/train")["layout"] == {
        "image": "image",
        "label": "label",
        "label_base": 0,
    }
    (labels,) = (part for part in evaluated("out/train", 7) if part.dtype == np.int32)
    assert labels[:7].tolist() == LABELS


def test_only_lengths_are_read(demo):
    """A damaged image does not stop the command; its example has no weight."""
    path = demo / "train-00001-of-00002"
    second = int(record_offsets(str(path))[1])
    data = bytearray(path.read_bytes())
    data[second + 40] ^= 1
    path.write_bytes(data)
    assert run(demo) == 0
    records = BadRecords(0.5, skip=True, log=print)
    parts = evaluated("out/train", 7, bad_records=records)
    weights = next(part for part in parts if part.dtype == np.float32 and part.ndim == 1)
    assert weights.tolist() == [1, 1, 1, 1, 1, 0, 1, 0]  # the last one fills the batch


def bytes_read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])  # rchar


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_of_long_records_only_the_lengths_are_read(tmp_path, scheme):
    source = tmp_path / "source"
    for shard in range(2):
        records = [b"x" * 20_000] * 100
        write(source / f"train-0000{shard}-of-00002", records)
    paths = [f"{scheme}{path}" for path in sorted(source.iterdir())]
    record_offsets(paths[0])  # imports what it needs
    before = bytes_read()
    counts = write_index(str(tmp_path), paths, fix="")
    assert counts == [100, 100]
    assert bytes_read() - before < 200 * (HEADER_BYTES + 1) + 20_000  # the latter for the threads
    offsets = record_offsets(paths[1])
    assert offsets.tolist() == [offset for offset, _ in read_records(paths[1])]


def damage_length(path, number):
    """Changes the length of a record; returns where it and the next one begin."""
    place, following = (int(offset) for offset in record_offsets(str(path))[number : number + 2])
    data = bytearray(path.read_bytes())
    data[place + 1] ^= 1
    path.write_bytes(data)
    return place, following


@pytest.fixture
def small(tmp_path):
    """A file of 2,000 small records; also their size in the file."""
    path = write(tmp_path / "small", [b"x" * 24] * 2_000)
    return path, path.stat().st_size // 2_000


def lenient(path):
    """Writes the index of a file, as the commands do; returns what it counts."""
    records = BadRecords(1.0, skip=True, log=print)
    write_index(str(path.parent), [str(path)], fix="Copy it again.", bad_records=records)
    return records.good, records.bad


@pytest.mark.parametrize("tail", ["cut", "zeros"])
def test_a_file_without_its_second_half_is_refused(small, tail):
    """It would count as one damaged record."""
    path, _ = small
    data = path.read_bytes()
    kept = len(data) // 2 + 5
    path.write_bytes(data[:kept] + bytes(len(data) - kept if tail == "zeros" else 0))
    with pytest.raises(InputError, match="damaged or truncated. Copy it again") as caught:
        lenient(path)
    assert f"{path}, byte {len(data) // 2}: no record" in str(caught.value)


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("zeros", "record 1000: the file is damaged from here on (no record is found after byte"),
        ("damage and cut", "record 1000: the file is damaged from here on (it ends 20 bytes after"),
    ],
)
def test_a_copy_of_a_file_without_its_second_half_is_refused(small, tail, said):
    """Also if the last record before the cut is damaged."""
    path, size = small
    data = bytearray(path.read_bytes())
    if tail == "zeros":
        data[1_000 * size + 5 :] = bytes(len(data) - 1_000 * size - 5)
    else:
        data[999 * size + 20] ^= 1
        del data[1_000 * size + 20 :]
    path.write_bytes(data)
    found = []
    with pytest.raises(InputError) as caught:
        found.extend(tfrecords._records(str(path)))
    assert f"{path}, {said}" in str(caught.value)


def test_a_last_record_that_is_damaged_costs_one_image(small):
    path, size = small
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    found = [record for _, record in tfrecords._records(str(path))]
    assert len(found) == 2_000 and found[-1] is None and None not in found[:-1]


def failing_after(count):
    """Stands for `records_from` and `TFRecordDataset`: storage that fails in a later record."""

    def read(number):
        if number == count:
            raise MemoryError("for a while")  # the status RESOURCE_EXHAUSTED
        return b"x" * 24

    return lambda *_, **__: tf.data.Dataset.range(2_000).map(
        lambda number: tf.ensure_shape(tf.py_function(read, [number], tf.string), [])
    )


def test_an_error_of_the_storage_is_no_damage(small, monkeypatch):
    path, _ = small
    monkeypatch.setattr(shards, "records_from", failing_after(600))
    found = []
    with pytest.raises(OSError, match="for a while"):
        found.extend(tfrecords._records(str(path)))
    with monkeypatch.context() as patch:
        patch.setattr(tf.data, "TFRecordDataset", failing_after(0))
        for function in (tfrecords.layout_of, tfrecords._compression):
            with pytest.raises(OSError, match="for a while"):
                function(str(path))
    missing = f"file://{path}-missing"
    for function in (tfrecords.layout_of, tfrecords._compression):
        with pytest.raises(FileNotFoundError):
            function(missing)


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_a_file_without_a_record_has_no_layout(tmp_path, compression):
    path = str(write(tmp_path / "none", [], compression))
    with pytest.raises(InputError, match=f"{path}: no record can be read. Copy it again."):
        tfrecords.layout_of(path)


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
def test_an_error_ends_the_search_in_the_other_files(small, tmp_path, monkeypatch, error):
    """Each of them has 2,000 records, for which the storage takes 20 s."""
    path, _ = small
    bad = tmp_path / "bad"
    bad.write_bytes(bytes(100))
    length = shards.record_length

    def slow(file, offset):
        time.sleep(0.01)
        return length(file, offset)

    monkeypatch.setattr(shards, "record_length", slow)
    files = [*[str(path)] * 31, str(bad) if error is InputError else str(path)]
    if error is KeyboardInterrupt:
        ctrl_c = threading.main_thread().ident, signal.SIGINT
        threading.Timer(0.5, signal.pthread_kill, ctrl_c).start()
    start = time.monotonic()
    with pytest.raises(error, match="bad, byte 0" if error is InputError else None):
        write_index(str(tmp_path), files, fix="Copy it again.")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("given", "used"), [(None, "0"), ("8", "8")])
def test_blocks_of_gs_are_off_when_tensorflow_is_imported(given, used):
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tensorflow':\n"
        "            os.write(1, os.environ['GCS_READ_CACHE_BLOCK_SIZE_MB'].encode())\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import inputs.images.index"
    )
    name = "GCS_READ_CACHE_BLOCK_SIZE_MB"
    environment = {key: value for key, value in os.environ.items() if key != name}
    environment |= {name: given} if given else {}
    root = pathlib.Path(shards.__file__).parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == used, done.stderr


@pytest.mark.parametrize("places", [[0], [300, 301, 600], [1_999]])
def test_records_around_damaged_ones_are_read(small, places):
    path, size = small
    data = bytearray(path.read_bytes())
    for place in places:
        data[place * size + 20] ^= 1
    path.write_bytes(data)
    found = [*read_records(str(path))]
    assert [offset for offset, _ in found] == [*range(0, 2_000 * size, size)]
    assert [place for place, (_, record) in enumerate(found) if record is None] == places


@pytest.mark.parametrize("first", [0, 700])
def test_a_gap_counts_as_the_records_that_were_in_it(small, first):
    path, size = small
    data = bytearray(path.read_bytes())
    data[first * size : (first + 300) * size] = bytes(300 * size)
    path.write_bytes(data)
    assert lenient(path) == (1_700, 300)


@pytest.mark.parametrize("number", [0, 2])
def test_a_damaged_length_is_named_and_costs_one_image(demo, capsys, number):
    """Also that of the first record of all; a share too small for it is refused."""
    path = demo / "train-00000-of-00002"
    place, following = damage_length(path, number)
    assert run(demo, "--max_bad_record_share=0.2") == 0
    said = capsys.readouterr()
    assert "out/train: 6 images" in said.out
    assert f"Skipped: {path}, byte {place}: damaged (its length" in said.err
    assert f"{following - place:,} bytes are left out" in said.err
    assert "1 of 7 records were damaged and skipped" in said.err
    kept = [label for i, label in enumerate(LABELS) if i != number]
    (labels,) = (part for part in evaluated("out/train", 6) if part.dtype == np.int32)
    assert labels[:6].tolist() == kept
    assert run(demo) == 1
    assert "raise the limit with --max_bad_record_share" in capsys.readouterr().err
    # A copy leaves out the same image.
    assert prepare("--source", demo, "--output", "copy", "--classes", "classes.csv") == 0
    said = capsys.readouterr()
    assert "copy/train: 6 images of 3 classes, 1 damaged and left out" in said.out
    assert f"Left out {path}, record {number}, byte {place}: damaged" in said.err
    assert "{{" not in said.err


DOT = encoded(smooth(1, 1), "PNG")


def many(label):
    """Two large files; the labels of a few records in the middle of the second are out of range."""

    def make(source):
        for shard in range(2):
            rows = [label if shard and 2_000 <= i < 2_020 else 1 for i in range(4_000)]
            records = [example(image__encoded=DOT, image__class__label=row) for row in rows]
            write(source / f"train-{shard:05d}-of-00002", records)

    return make


def labelled(**features):
    return lambda source: write(
        source / "train-00000-of-00001",
        [example(**{key: value[i] for key, value in features.items()}) for i in range(3)],
    )


@pytest.mark.parametrize(
    ("make", "flags", "said"),
    [
        (
            labelled(image__encoded=PICTURES, image__class__label=(1, 2, 0)),
            (),
            "image/class/label: 0 is outside the labels 1 to 3 of this layout. If all labels count "
            "from 0, give --label_base=0",
        ),
        (
            labelled(image=PICTURES, label=(5, 6, 7)),
            (),
            "byte 0, label: 5 is outside the labels 0 to 2 of this layout. The records mix label "
            "bases, or the class list lacks classes.",  # which --label_base=1 would not mend
        ),
        (
            labelled(
                image__encoded=PICTURES,
                image__class__label=(0, 1, 1),
                image__class__synset=(b"a", b"b", b"c"),
            ),
            ("--label_base=0",),
            "image/class/label: 1 is b in the class list, but image/class/synset is c. The two",
        ),
        (many(4), (), "train-00001-of-00002, byte"),
        (many(3), (), ""),
    ],
)
def test_labels_must_agree_with_the_class_list(tmp_path, capsys, make, flags, said):
    (tmp_path / "classes.csv").write_text(CLASSES)
    make(tmp_path / "source")
    assert run(tmp_path / "source", *flags) == bool(said)
    assert said in capsys.readouterr().err
    assert (tmp_path / "out/train/manifest.json").exists() != bool(said)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (encoded(smooth(60, 80))[:1200], "jpeg::Uncompress failed"),
        (b"no image", "Unknown image file format"),
        (
            encoded(smooth(8, 8), "BMP", "P"),
            "a BMP that `python -m inputs.images.prepare` converts",
        ),
    ],
)
def test_images_that_cannot_be_decoded_are_limited(demo, tmp_path, capsys, image, reason):
    path = demo / "validation-00000-of-00001"
    records = [demo_record(0), example(image__encoded=image, image__class__label=1)]
    write(path, records)
    assert run(demo) == 1
    said = capsys.readouterr().err
    place = int(record_offsets(str(path))[1])
    assert f"{path}, byte {place}: the image cannot be decoded ({reason}" in said
    assert "1 of 2 images that were checked cannot be decoded, more than the share of" in said
    assert not (tmp_path / "out/validation/manifest.json").exists()
    assert run(demo, "--max_bad_record_share=0.5") == 0
    assert f"cannot be decoded: {path}, byte {place}" in capsys.readouterr().err


def test_the_label_base_is_that_of_both_splits(tmp_path, capsys):
    """The validation split alone has neither the label 0 nor the label 3."""
    source = tmp_path / "source"
    for split, labels in (("train", (1, 2, 3)), ("validation", (1, 2))):
        records = [example(image=PICTURES[label], label=label) for label in labels]
        write(source / f"{split}-00000-of-00001", records)
    (source / "label.labels.txt").write_text("a\nb\nc\n")
    assert run(source, classes=None) == 0
    for split in ("train", "validation"):
        assert manifest(tmp_path / "out" / split)["layout"]["label_base"] == 1
    assert capsys.readouterr().err.count("Labels count from 1") == 1


@pytest.mark.parametrize("files", [1, 40])
def test_few_records_of_each_file_are_checked(small, tmp_path, files):
    path = str(small[0])
    places = []
    write_index(str(tmp_path), [path] * files, fix="", check=lambda *place: places.append(place))
    assert len(places) == 2_000 and len(set(places)) == 2_000 // files


@pytest.mark.parametrize("command", [index.main, lambda flags: prepare(*flags)])
def test_one_line_says_what_is_read_and_what_is_not(demo, capsys, command):
    write(demo / "test-00000-of-00001", [example(image__encoded=b"", image__class__label=-1)])
    others = ("p-train2.tfrecord-00000-of-00002", "p-train2.tfrecord-00001-of-00002")
    others += ("train_00001.tfrecord", "train-00001-of-00002.incomplete", ".hidden")
    for name in (*others, "label.labels.txt"):
        (demo / name).write_bytes(b"")
    assert command([f"--source={demo}", "--output=out", "--classes=classes.csv"]) == 0
    said = capsys.readouterr().err
    assert f"{demo}: the test split is passed over, as there is a validation split\n" in said
    passed_over = "5 passed over: 3 × .tfrecord, 1 × hidden, 1 × .incomplete"
    assert f"{demo}: 3 files to read; {passed_over}\n" in said


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("command", [index.main, lambda flags: prepare(*flags)])
def test_a_missing_split_is_named(demo, tmp_path, capsys, command, split):
    for path in demo.glob(f"{split}-*"):
        path.unlink()
    assert command([f"--source={demo}", "--output=out", "--classes=classes.csv"]) == 0
    said = f"has no {split} split, which training needs. Give its images to `python -m inputs.imag"
    assert f"out {said}" in capsys.readouterr().err
    with pytest.raises(InputError, match=f"^--data_dir: {tmp_path}/out {said}"):
        Images(f"out/{split}", 16, seed=1)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_command_that_fails_leaves_an_earlier_index_as_it_is(demo, tmp_path, capsys):
    assert run(demo) == 0
    before = contents(tmp_path / "out")
    damage_length(demo / "train-00000-of-00002", 1)
    assert run(demo) == 1
    assert "raise the limit with --max_bad_record_share" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_a_folder_takes_the_splits_of_one_source(demo, tmp_path, capsys):
    """Training would mix them; the same source may be indexed again, also after a change."""
    other = tmp_path / "other"
    write(other / "train-00000-of-00001", map(demo_record, range(2)))
    assert run(demo) == 0
    before = contents(tmp_path / "out")
    for indexed in ("train", "validation"):
        assert run(other) == 1
        said = f"out/{indexed} was made from {demo}, and training would mix it with {other}. Give"
        assert said in capsys.readouterr().err
        assert contents(tmp_path / "out").items() <= before.items()
        shutil.rmtree(tmp_path / "out" / indexed)
    write(demo / "train-00001-of-00002", map(demo_record, range(4, 6)))
    assert run(demo) == 0 and run("source/") == 0
    assert "out/train: 6 images" in capsys.readouterr().out
    assert prepare("--source", demo, "--output", "copy", "--classes", "classes.csv") == 0
    assert index.main([f"--source={demo}", "--output=copy", "--classes=classes.csv"]) == 1
    assert "copy/train was made by another command" in capsys.readouterr().err


def test_the_versions_of_a_data_set_of_tensorflow_datasets(tmp_path, capsys):
    name = "imagenet2012-train.tfrecord-00000-of-00001"
    source = tmp_path / "imagenet2012"
    write(source / "5.1.0" / name, map(tfds_record, range(7)))
    (source / "5.1.0/label.labels.txt").write_text("a\nb\nc\n")
    assert index.main([f"--source={source}", "--output=out/"]) == 0
    assert "out/train: 7 images" in capsys.readouterr().out
    assert prepare("--source", source, "--output", "copy/") == 0
    assert "copy/train: 7 images" in capsys.readouterr().out
    write(source / "5.0.0" / name, map(tfds_record, range(2)))
    assert index.main([f"--source={source}", "--output=out"]) == 1
    assert f"{source}/5.0.0, {source}/5.1.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda source: (source / "train-00001-of-00002").unlink(), "1 of the 2 train files"),
        (
            lambda source: (source / "train-00001-of-00002").write_bytes(
                (source / "train-00001-of-00002").read_bytes()[:-5]
            ),
            "train-00001-of-00002",
        ),
        (
            lambda source: write(source / "train-00001-of-00002", [demo_record(0)], "GZIP"),
            "train-00001-of-00002",
        ),
        (lambda source: (source.parent / "classes.csv").unlink(), "classes.csv"),
    ],
)
def test_what_cannot_be_indexed_is_named(demo, capsys, change, said):
    change(demo)
    assert run(demo) == 1
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown
    assert shown.strip().splitlines()[-1].startswith("inputs.images.index: ")


def test_an_empty_file_has_no_images(demo, capsys):
    write(demo / "train-00000-of-00002", [])
    assert run(demo) == 0
    assert "out/train: 3 images" in capsys.readouterr().out
    write(demo / "train-00001-of-00002", [])
    assert run(demo) == 1
    assert "all 2 files of train in" in capsys.readouterr().err


def test_without_a_list_of_classes_the_message_says_what_serves(demo, capsys):
    assert run(demo, classes=None) == 1
    assert "--classes is needed" in capsys.readouterr().err
    assert index.main(["--source=", "--output=out"]) == 1
    (demo / "label.labels.txt").write_bytes(b"caf\xe9\n")
    assert run(demo, classes=None) == 1
    assert "label.labels.txt is not UTF-8" in capsys.readouterr().err
    assert index.main(["--source=nowhere", "--output=out"]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["moved", "longer", "index"])
def test_files_that_changed_after_the_index_are_refused(demo, tmp_path, change):
    assert run(demo) == 0
    path = demo / "train-00000-of-00002"
    if change == "moved":
        path.rename(path.with_name("elsewhere"))
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"more")
    else:
        next((tmp_path / "out/train/index").glob("index*")).unlink()
    with pytest.raises(InputError, match="index" if change == "index" else "train-00000-of-00002"):
        Images("out/train", 16, seed=1)
