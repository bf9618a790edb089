"""Data that is prepared, indexed, cached and read on object storage equals that on a disk.

`ram://` is a file system of TensorFlow that `os` does not see.
"""

import json
import os
import pathlib
import random
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from batch_checks import joined
from faulty_storage import Killed, faulty_storage, lease_times
from pictures import class_folders, encoded, example, prepare, smooth

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.images import examples, index, shards
from inputs.storage import files, remote
from inputs.text import corpus
from inputs.text import prepare as prepare_text
from inputs.text import shards as text_shards
from inputs.text.tokenization import word_pieces
from recipes import find_recipe

OLD = pathlib.Path(__file__).parents[1] / "data/shards/files.zip"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    lease_times(monkeypatch)
    monkeypatch.setattr(word_pieces, "BATCH_CHARACTERS", 3000)
    yield
    assert not [name for name in os.listdir() if ":" in name]  # a local folder called ram:


def upload(folder, target):
    """Copies a local folder to object storage."""
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.is_file():
            place = f"{target}/{path.relative_to(folder)}"
            files.make_folder(files.parent(place))
            remote.upload(place, path.read_bytes())


def contents(folder):
    """Name -> bytes of all files below a folder, on a disk or on ram://, but left-overs."""
    found = [entry.path for entry in files.walk(str(folder), "--flag")]
    return {path.removeprefix(f"{folder}/"): files.read_file(path) for path in found}


@pytest.fixture
def places(tmp_path, ram):
    """Two folders with the same `source`: raw text, a vocabulary, and images in class folders."""
    rng = random.Random(0)
    words = "cat dog bird fish sat went looked slept mat log tree sea the a on to".split()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]
    local = tmp_path / "source"
    (local / "text").mkdir(parents=True)
    (local / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces))
    documents = (
        "\n".join(" ".join(rng.choices(words, k=20)) + "." for _ in range(4)) for _ in range(60)
    )
    (local / "text/a.txt").write_text("\n\n".join(documents))
    class_folders(local / "images", per_class=2, size=(20, 24))
    upload(local, f"{ram}/source")
    return str(tmp_path), ram


def prepare_at(place, **more):
    prepare_text.prepare(
        f"{place}/source/text",
        f"{place}/source/vocab.txt",
        f"{place}/out",
        workers=0,
        shard_tokens=1500,
        sequence_lengths=[32],
        **more,
    )


def strict():
    return BadRecords(0.0, skip=False, log=print)


def test_prepared_text(places):
    for place in places:
        prepare_at(place)
    expected, found = (contents(f"{place}/out") for place in places)
    assert found == expected and len([name for name in found if name.startswith("shard-")]) > 2
    said = []
    prepare_at(places[1], log=said.append)
    assert any(line.endswith("finished shards were verified and kept") for line in said)
    opened = [corpus.load_prepared(f"{place}/out", "", strict()) for place in places]
    for one, other in zip(*(sides[:2] for sides in opened), strict=True):
        np.testing.assert_array_equal(one.tokens.all(), other.tokens.all())
    # A shard that was cut off is written again.
    shard = f"{places[1]}/out/shard-00001.tfrecord"
    remote.upload(shard, remote.read(shard)[:-9])
    prepare_at(places[1])
    assert contents(f"{places[1]}/out") == expected


def test_text_that_is_killed_often_is_the_same_at_the_end(places, monkeypatch):
    """In operations of a storage that shows half-written objects and old listings."""
    local, ram = places
    prepare_at(local)
    rng, kills = random.Random(1), 0
    with faulty_storage(monkeypatch, stale=0.3) as storage:
        while True:
            storage.kill_at(rng.randrange(1, 60 + 20 * kills))
            try:
                prepare_at(ram)
                break
            except Killed:
                kills += 1
                storage.restart()
        storage.restart()
    found = {n: data for n, data in contents(f"{ram}/out").items() if not n.endswith(files.NEW)}
    assert kills > 5 and found == contents(f"{local}/out")


def test_raw_text_is_prepared_in_a_cache_there(places):
    """The second start finds it."""
    said = []
    local, ram, again = (
        prepare_text.prepare_in_cache(
            f"{place}/source/text",
            "",  # learns a vocabulary
            find_recipe("bert-mini-demo"),
            known_case=None,
            records=strict(),
            cache_dir=f"{place}/cache",
            log=said.append,
        )
        for place in (*places, places[1])
    )
    assert contents(ram) == contents(local) and again == ram
    assert ram.startswith(f"{places[1]}/cache/text-")
    assert said[-1] == f"It was prepared before, in {ram}"


def test_prepared_images(places):
    for place in places:
        assert prepare("--source", f"{place}/source/images", "--output", f"{place}/out") == 0
    expected, found = (contents(f"{place}/out") for place in places)
    manifests = [json.loads(side.pop("train/manifest.json")) for side in (expected, found)]
    assert found == expected and found
    for manifest, place in zip(manifests, places, strict=True):
        plan = manifest.pop("plan")
        assert plan["source"] == f"{place}/source/images"
    assert manifests[0] == manifests[1]
    one, other = (
        joined(examples.Images(f"{place}/out/train", 16, seed=1).training_batches(4).take(2))
        for place in places
    )
    tf.nest.map_structure(np.testing.assert_array_equal, one, other)
    assert prepare("--source", f"{places[1]}/source/images", "--output", f"{places[1]}/out") == 0


def test_images_that_are_killed_often_are_the_same_at_the_end(places, monkeypatch):
    local, ram = places
    source = ["--source", f"{ram}/source/images"]
    assert prepare(*source, "--output", f"{local}/out") == 0
    rng, kills = random.Random(2), 0
    with faulty_storage(monkeypatch, stale=0.3) as storage:
        while True:
            storage.kill_at(rng.randrange(1, 40 + 20 * kills))
            try:
                assert prepare(*source, "--output", f"{ram}/out") == 0
                break
            except Killed:
                kills += 1
                storage.restart()
        storage.restart()
    found = {n: data for n, data in contents(f"{ram}/out").items() if not n.endswith(files.NEW)}
    assert kills > 3 and found == contents(f"{local}/out")


def test_tfrecords_are_indexed_where_they_lie(ram, tmp_path, capsys):
    """The index may be on a disk or beside the records."""
    pictures = [encoded(smooth(20, 24, seed=i)) for i in range(4)]
    for number in range(2):
        with tf.io.TFRecordWriter(str(tmp_path / f"train-{number:05d}-of-00002")) as writer:
            for i in range(2 * number, 2 * number + 2):
                writer.write(example(image=pictures[i], label=i % 2, file_name=b"x.JPEG"))
    (tmp_path / "label.labels.txt").write_text("n0\nn1\n")
    upload(tmp_path, f"{ram}/records")
    for output in (f"{ram}/index", str(tmp_path / "index")):
        assert index.main([f"--source={ram}/records", f"--output={output}"]) == 0
        opened = shards.open_images(f"{output}/train")
        assert opened.paths == [f"{ram}/records/train-{i:05d}-of-00002" for i in range(2)]
        data = examples.Images(f"{output}/train", 16, seed=1)
        assert sorted(data.training_batches(4).take(1).get_single_element()["label"]) == [
            0,
            0,
            1,
            1,
        ]
        assert [found for found, _ in data.files(4)] == pictures
    capsys.readouterr()
    assert index.main([f"--source={ram}/nowhere", f"--output={ram}/other"]) == 1
    assert f"{ram}/nowhere cannot be read (No such file or directory)" in capsys.readouterr().err


def test_shards_of_version_0_1_0(ram, tmp_path):
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path)
    upload(tmp_path, ram)
    for place in (ram, str(tmp_path)):
        assert prepare("--source", f"{place}/photos", "--output", f"{place}/new") == 0
    one, other = (
        list(examples.Images(f"{place}/new/validation", 16, seed=1).files(2))
        for place in (ram, tmp_path)
    )
    assert one == other and len(one) == 2
    manifest = text_shards.load_manifest(f"{ram}/text")
    found, expected = (
        [
            (tokens.tobytes(), lengths.tolist())
            for shard in manifest["shards"]
            for tokens, lengths in text_shards.read_shard(
                f"{place}/text", shard, manifest["token_dtype"], strict()
            )
        ]
        for place in (ram, tmp_path)
    )
    assert found == expected and len(found) == 8


@pytest.mark.parametrize("command", ["text", "images", "index"])
def test_an_output_that_no_storage_has_is_one_sentence(command, places, capsys):
    local = places[0]
    if command == "text":
        status = prepare_text.main(
            [
                f"--input={local}/source/text",
                f"--vocab={local}/source/vocab.txt",
                "--output=foo://a",
            ]
        )
    elif command == "images":
        status = prepare("--source", f"{local}/source/images", "--output", "foo://a")
    else:
        status = index.main([f"--source={local}/source", "--output=foo://a"])
    assert status == 1
    *_, said = capsys.readouterr().err.splitlines()
    if command != "index":  # which finds no records first
        assert "--output: foo://a" in said and "has no file system for foo://" in said


def test_the_folder_of_a_path():
    """Above a bucket there is nothing; it must not become a local folder called gs:."""
    assert files.parent("gs://bucket/a/b/") == "gs://bucket/a"
    assert files.parent("gs://bucket") == files.parent("gs://a") == "gs://"
    assert files.absolute("ram://") == "ram://" and files.is_remote(files.parent("ram://a"))
    assert files.parent("file:///a") == "file:///"
    with pytest.raises(InputError, match="--flag"):
        files.check_writable("foo://", "--flag")
