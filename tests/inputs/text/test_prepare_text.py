"""Prepared text: same batches as raw text, stopped preparations continue, errors are clear."""

import dataclasses
import errno
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_text as tf_text
from batch_checks import corpora, document_tokens, joined
from read_only import read_only

from inputs import pages
from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.shards import read_records
from inputs.storage.files import locked
from inputs.text import corpus, documents, examples
from inputs.text import files as text_files
from inputs.text import prepare as prepare_text
from inputs.text.tokenization import vocabulary, word_pieces
from recipes import find_recipe, resized
from tasks import TASKS

ROOT = pathlib.Path(__file__).parents[3]
SHARD_TOKENS = 1500
WORDS = "cat dog bird fish sat went looked slept mat log tree sea the a on to".split()


def records(skip=True, log=print, share=0.05):
    return BadRecords(share, skip=skip, log=log)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a vocabulary, and with text that repeats two documents."""
    folder = tmp_path_factory.mktemp("source")
    rng = random.Random(0)
    pieces = [*vocabulary.SPECIAL_TOKENS, *sorted(WORDS), ".", "##s", *"0123456789"]
    vocabulary.save_vocabulary(pieces + [f"##{i}" for i in range(10)], folder / "vocab.txt")
    (folder / "text").mkdir()
    articles = [
        [" ".join(rng.choices(WORDS, k=rng.randint(3, 40))) + "." for _ in range(rng.randint(1, 6))]
        for _ in range(150)
    ]
    articles += [articles[3], [p.upper() for p in articles[70]]]
    with open(folder / "text/a.jsonl", "w") as file:
        file.writelines(json.dumps({"paragraphs": a}) + "\n" for a in articles[:90])
    (folder / "text/b.txt").write_text("\n\n".join("\n".join(a) for a in articles[90:]))
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(word_pieces, "BATCH_CHARACTERS", 3000)


def prepare(source, output, **changes):
    arguments = {"workers": 0, "shard_tokens": SHARD_TOKENS} | changes
    return prepare_text.prepare(
        str(source / "text"), str(source / "vocab.txt"), str(output), **arguments
    )


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A folder that was prepared without a stop. Tests must not change it."""
    folder = tmp_path_factory.mktemp("whole") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_pieces, "BATCH_CHARACTERS", 3000)
        prepare(source, folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of `whole`, which a test may change."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))


def content(folder):
    """Name -> bytes of the files in a prepared folder, but the lock."""
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*") if path.is_file()}


def load(folder, vocab="", **changes):
    return corpus.load_prepared(str(folder), str(vocab), records(**changes))


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[1500] ^= 1
    path.write_bytes(data)


def test_a_change_within_a_text_is_noticed(source, folder, monkeypatch):
    """Also one that changes neither its size nor its ends."""
    monkeypatch.setattr(prepare_text, "SLOWLY_READ", 0)
    said = []
    prepare(source, folder, log=said.append)
    assert any("Reading the text once to see whether it is the one" in line for line in said)
    path = source / "text/a.jsonl"
    before = path.read_bytes()
    middle = before.index(b"e", len(before) // 2)
    try:
        path.write_bytes(before[:middle] + b"a" + before[middle + 1 :])
        with pytest.raises(InputError, match="was begun with another `inputs`"):
            prepare(source, folder)
    finally:
        path.write_bytes(before)


def test_a_share_outside_0_to_1_is_refused(source, tmp_path):
    for share in (-1.0, 2.0, float("nan")):
        with pytest.raises(InputError, match=f"--max_bad_record_share={share:g}: give a share"):
            prepare(source, tmp_path / "new", max_bad_record_share=share)


@pytest.mark.slow
def test_the_documents_are_those_of_the_text(source, folder):
    pieces = vocabulary.load_vocabulary(source / "vocab.txt")
    training, held_out, kept_pieces, fingerprint = load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert fingerprint == manifest["fingerprint"] and kept_pieces == pieces
    assert manifest["documents"] == 150
    assert manifest["repeated_documents"] == 2 and len(manifest["shards"]) > 3
    read = documents.read_documents(text_files.find_files(str(source / "text")), records())
    tokenizer = word_pieces.Tokenizer(pieces, lower_case=True)
    expected = {
        tokens.tobytes(): lengths.tolist()
        for document in read
        for tokens, lengths in tokenizer([document]).documents()
    }
    found = {}
    for side in (training, held_out):
        assert side.tokens.all().dtype == np.uint16
        sentences, bounds = side.sentences.all(), side.documents.all()
        for number, tokens in enumerate(document_tokens(side)):
            assert tokens[-1] == pieces.index("[SEP]")
            lengths = np.diff(sentences[bounds[number] : bounds[number + 1] + 1])
            lengths[-1] -= 1
            found[tokens[:-1].astype(np.int32).tobytes()] = lengths.tolist()
    assert found == expected and len(held_out.documents) - 1 == 3


@pytest.mark.slow
def test_raw_text_is_prepared_in_the_cache_once(source, folder, tmp_path):
    """Its batches are those of the prepared folder, and the second start reads no text."""
    recipe = resized(find_recipe("bert-mini-demo"), global_batch_size=8)

    def make(data_dir, log=print):
        return TASKS[recipe.task](
            recipe,
            data_dir=str(data_dir),
            vocab=str(source / "vocab.txt"),
            resume_dir=None,
            seed=1,
            synthetic=False,
            log=log,
            cache_dir=str(tmp_path / "cache"),
        )

    said = []
    tasks = [make(source / "text"), make(source / "text", said.append), make(folder)]
    assert any(line.startswith("It was prepared before, in ") for line in said)
    first, *others = (joined(task.train_batches(0, 3)(None).take(2)) for task in tasks)
    for other in others:
        tf.nest.map_structure(np.testing.assert_array_equal, first, other)
    assert len({task.facts["data"] for task in tasks}) == 1
    assert len({task.order(0) for task in tasks}) == 1 and tasks[0].order(0).examples > 2
    text = (source / "text/a.jsonl").read_text()
    try:
        (source / "text/a.jsonl").write_text(text.replace("cat", "dog"))
        assert make(source / "text").facts["data"] != tasks[0].facts["data"]
    finally:
        (source / "text/a.jsonl").write_text(text)


def test_sequences_are_cut_by_the_command(source, folder):
    said = []
    prepare(source, folder, log=said.append, sequence_lengths=[32, 64])
    assert [line.split(" tokens")[0] for line in said[-4:]] == [
        *["Sequences of 32"] * 2,
        *["Sequences of 64"] * 2,
    ]
    assert (folder / "pages/training/pairs-64/table").exists()
    before = made(folder)
    first_batch(load(folder)[0], vocabulary.load_vocabulary(folder / "vocab.txt"))
    assert made(folder) == before
    flags = [f"--input={source}/text", f"--vocab={source}/vocab.txt", f"--output={folder}"]
    assert prepare_text.main([*flags, "--sequence_lengths=32,x"]) == 1


def test_a_stopped_preparation_continues(source, whole, tmp_path, monkeypatch):
    """After Ctrl-C the unfinished shard is removed and the finished ones are kept."""
    given = []

    def stopping(*arguments, **more):
        for index, batch in enumerate(tokenize(*arguments, **more)):
            if index == 7:
                raise KeyboardInterrupt
            given.append(batch)
            yield batch

    tokenize = prepare_text.tokenize_in_order
    monkeypatch.setattr(prepare_text, "tokenize_in_order", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.new"))
    kept = sorted((tmp_path / "run").glob("shard-*"))
    assert 0 < len(kept) < len(list(whole.glob("shard-*")))
    times = [path.stat().st_mtime_ns for path in kept]
    with pytest.raises(InputError, match="is not finished"):
        load(tmp_path / "run")
    monkeypatch.setattr(prepare_text, "tokenize_in_order", tokenize)
    said = []
    prepare(source, tmp_path / "run", log=said.append)
    assert said[1] == f"{len(kept)} finished shards were verified and kept"
    assert [line.split()[0] for line in said[2:]] == ["Text:", "0"]
    assert times == [path.stat().st_mtime_ns for path in kept]
    assert content(tmp_path / "run") == content(whole)


COMMAND = """
import sys
from inputs.text import prepare
from inputs.text.tokenization import word_pieces
word_pieces.BATCH_CHARACTERS = 3000
sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_command_with_worker_processes(source, whole, tmp_path):
    """It writes the same shards, and prints plain lines without messages of TensorFlow."""
    flags = {"input": source / "text", "vocab": source / "vocab.txt", "output": tmp_path / "run"}
    flags |= {"workers": 2, "shard_tokens": SHARD_TOKENS}
    command = [sys.executable, "-c", COMMAND, *(f"--{key}={value}" for key, value in flags.items())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    del environment["TF_CPP_MIN_LOG_LEVEL"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert content(tmp_path / "run") == content(whole)
    lines = done.stderr.split("\n")
    assert len(lines) > 7 and lines.pop() == ""
    assert lines.pop(0) == f"{source}/text: 2 files to read"
    assert lines.pop(0) == "Text: lower-cased, accents dropped (uncased vocabulary)"
    assert re.fullmatch(r"0 of [\d,]+ tokens are \[UNK\] \(0.00%\)", lines.pop())
    for index, line in enumerate(lines):
        assert re.fullmatch(rf"shard-{index:05d}\.tfrecord: [\d,]+ tokens \(\d+%\)", line)
    assert "tokens in 150 documents, 3 of them held out" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_damaged_shard_is_written_again(source, whole, folder):
    flip_a_byte(folder / "shard-00002.tfrecord")
    said = []
    prepare(source, folder, log=said.append)
    assert any("shard-00002.tfrecord, byte" in line for line in said)
    assert "shard-00002.tfrecord and the shards after it are written again" in said
    assert content(folder) == content(whole)


def test_a_flipped_byte_loses_one_document_or_stops(folder):
    before = load(folder)[3]
    shutil.rmtree(folder / "pages")
    flip_a_byte(folder / "shard-00001.tfrecord")
    with pytest.raises(InputError, match=r"shard-00001.tfrecord, byte \d+: damaged"):
        load(folder, skip=False)
    assert not (folder / "pages").exists() or not list((folder / "pages").iterdir())
    said = []
    training, held_out, _, fingerprint = load(folder, log=said.append)
    assert len(training.documents) + len(held_out.documents) - 2 == 149
    assert fingerprint != before
    assert "1 of 150 records were damaged" in said[-1]
    # The next start reads the shards again, and leaves the files alone that another run reads.
    path = folder / "pages/training/tokens"
    kept = path.stat().st_ino
    assert load(folder)[3] == fingerprint and path.stat().st_ino == kept


@pytest.mark.parametrize("size", [None, 0, 100])
def test_a_missing_or_truncated_shard_is_named(folder, size):
    shutil.rmtree(folder / "pages")
    path = folder / "shard-00001.tfrecord"
    path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    said = "is missing" if size is None else "records, but the manifest says"
    lost = "of the file are damaged, so the file probably has another format"
    with pytest.raises(InputError, match=f"shard-00001.tfrecord.*{said}.*{lost}"):
        load(folder, share=0.4)


def test_the_end_of_a_shard_that_was_cut_is_missing(folder):
    shutil.rmtree(folder / "pages")
    path = folder / "shard-00001.tfrecord"
    path.write_bytes(path.read_bytes()[:-10])
    said = []
    training, held_out, *_ = load(folder, log=said.append)
    assert len(training.documents) + len(held_out.documents) - 2 == 149
    assert re.search(r"shard-00001.tfrecord holds \d+ records, but the manifest says \d+", said[0])


def test_a_record_whose_length_is_damaged_hides_no_other(folder):
    shutil.rmtree(folder / "pages")
    path = folder / "shard-00001.tfrecord"
    places = [offset for offset, _ in read_records(str(path))]
    for changed in range(12):  # the length, and its checksum
        content = bytearray(path.read_bytes())
        content[places[3] + changed] ^= 4
        (folder / "changed").write_bytes(content)
        found = list(read_records(str(folder / "changed")))
        assert [offset for offset, _ in found] == places
        assert [record is None for _, record in found] == [i == 3 for i in range(len(places))]


def test_a_truncated_array_is_written_again(folder):
    expected = load(folder)[0].tokens.all().tobytes()
    path = folder / "pages/training/tokens"
    path.write_bytes(path.read_bytes()[:-1])
    assert load(folder)[0].tokens.all().tobytes() == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "is not a manifest of tokenized text"),
        ({"version": 1}, "`version` is 1, but this program reads 3"),
        ({"shards": None}, "`shards` is missing or not of type list"),
        ({"fingerprint": 3}, "`fingerprint` is missing or not of type str"),
        ({"shards": [{}]}, "`file` is missing or not of type str"),
        ({"vocabulary_hash": "0"}, "`vocabulary_hash` in manifest.json is 0"),
    ],
)
def test_errors_in_a_manifest_are_named(folder, changes, said):
    change_manifest(folder, **changes)
    with pytest.raises(InputError, match=said):
        load(folder)


def test_train_takes_the_folder(folder, in_process, capfd, tmp_path):
    recipe = resized(find_recipe("bert-mini-demo"), global_batch_size=8)
    recipe = dataclasses.replace(recipe, packing="full-sentences")
    task = TASKS[recipe.task](
        recipe,
        data_dir=str(folder),
        vocab="",
        resume_dir=None,
        seed=1,
        synthetic=False,
        log=lambda line: None,
    )
    assert task.data == str(folder)
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    assert task.facts["data"] == fingerprint
    for batches in (task.train_batches(0, 0), task.evaluation_batches(0)):
        batch = next(iter(batches(None)))
        assert batch["masked_lm_weights"].numpy().any()
        assert not batch["next_sentence_weights"].numpy().any()
    results = {"masked_accuracy": 0.5, "frequent_token": 0.1}
    assert "next-sentence" not in task.describe(results)
    change_manifest(folder, version=1)
    assert in_process([f"--data_dir={folder}", f"--model_dir={tmp_path}/run"]) == 1
    assert "`version` is 1" in capfd.readouterr().err


def test_another_vocabulary_is_refused(source, folder, tmp_path):
    pieces = vocabulary.load_vocabulary(source / "vocab.txt")
    vocabulary.save_vocabulary([*pieces, "more"], tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="--vocab: .*is not the vocabulary of the text in"):
        load(folder, tmp_path / "vocab.txt")


def test_a_folder_with_other_content_is_refused(source, folder, tmp_path):
    with pytest.raises(InputError, match=r"has other content \(text\)"):
        prepare(source, source)
    with pytest.raises(InputError, match="was begun with another `shard_tokens`"):
        prepare(source, folder, shard_tokens=1)
    (source / "text/c.txt").write_text("more")
    try:
        with pytest.raises(InputError, match="was begun with another `inputs`"):
            prepare(source, folder)
    finally:
        (source / "text/c.txt").unlink()


def test_shards_inside_their_input_are_not_read_as_text(source, tmp_path):
    shutil.copytree(source, tmp_path / "all")
    output = tmp_path / "all/text/shards"
    first = prepare(tmp_path / "all", output)
    (output / "vocab.txt").write_text("lost")
    (output / "manifest.json.new").write_text("from a process that was killed")
    said = []
    again = prepare(tmp_path / "all", output, log=said.append)
    assert again["fingerprint"] == first["fingerprint"]
    assert "is finished already" in said[-1]
    assert (output / "vocab.txt").read_bytes() == (source / "vocab.txt").read_bytes()
    with pytest.raises(
        InputError, match="shards holds prepared shards .manifest.json.*as the only entry"
    ):
        text_files.find_files(f"{source}/text,{output}")


def made(folder):
    """The names of the files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def first_batch(training, pieces):
    """The first batch of pairs, for which the table of chunks is needed."""
    made_of = {"sequence_length": 32, "predictions": 4, "whole_word": False, "seed": 1}
    return next(iter(examples.Examples(training, pieces, **made_of).training_batches(4)))


@pytest.mark.slow
@pytest.mark.parametrize("used", ["never", "before", "with other packing"])
def test_shards_that_cannot_be_written(folder, tmp_path, used):
    """As on a read-only mount. What is missing is written into the cache, once."""
    fingerprint = json.loads((folder / "manifest.json").read_text())["fingerprint"]
    cache = pathlib.Path.home() / ".cache/tf_lamb" / fingerprint
    shutil.rmtree(cache, ignore_errors=True)
    training, held_out, pieces, _ = load(folder)
    expected, held_out_tokens = first_batch(training, pieces), held_out.tokens.all()
    layout = folder / "pages"
    if used == "never":
        shutil.rmtree(layout)
    if used == "with other packing":
        (chunks,) = (layout / "training").glob("pairs-*")
        shutil.rmtree(chunks)
    before = made(folder)
    said = []
    with read_only(folder):
        for _ in range(2):
            training, again, pieces, _ = corpus.load_prepared(
                str(folder), "", records(), log=said.append
            )
            batch = first_batch(training, pieces)
    tf.nest.map_structure(np.testing.assert_array_equal, batch, expected)
    np.testing.assert_array_equal(again.tokens.all(), held_out_tokens)
    assert made(folder) == before
    cached = cache.exists()
    shutil.rmtree(cache, ignore_errors=True)  # other tests expect the files in the folder
    assert cached == (used != "before")
    assert said == [f"Laying out the token ids of {folder} in {cache}"] * (used == "never")


def test_the_cache_is_where_the_flag_says(folder, tmp_path, monkeypatch):
    """Also if the shards can be written, as on a slow disk; and the error names the flag."""
    shutil.rmtree(folder / "pages")
    before = made(folder)
    training, *_ = corpus.load_prepared(str(folder), "", records(), cache_dir=str(tmp_path / "c"))
    assert training.folder.startswith(f"{tmp_path}/c/") and made(folder) == before
    monkeypatch.setattr(corpus, "cache_folder", lambda: str(tmp_path / "closed"))
    (tmp_path / "closed").mkdir()
    with read_only(folder), read_only(tmp_path / "closed"):
        with pytest.raises(InputError) as error:
            load(folder)
    said = str(error.value)
    assert said.startswith(f"--data_dir: {folder} cannot be written (Permission denied), and ")
    assert said.endswith("Give a folder for them with --cache_dir.")


def test_the_task_passes_the_folder_of_the_cache(folder, tmp_path):
    shutil.rmtree(folder / "pages")
    recipe = resized(find_recipe("bert-mini-demo"), steps=10, global_batch_size=8)
    TASKS[recipe.task](
        recipe,
        data_dir=str(folder),
        vocab="",
        resume_dir=None,
        seed=1,
        synthetic=False,
        log=print,
        cache_dir=str(tmp_path / "cache"),
    )
    assert list((tmp_path / "cache").glob("*/pages/training/arrays.json"))


def test_two_at_once_are_refused(source, tmp_path):
    with locked(str(tmp_path), "--output"):
        with pytest.raises(InputError, match=r"--output: .* is in use by process \d+ on "):
            prepare(source, tmp_path)


def test_damaged_lines_are_left_out_up_to_the_limit(source, tmp_path):
    (tmp_path / "text").mkdir()
    good = (source / "text/a.jsonl").read_bytes()
    (tmp_path / "text/a.jsonl").write_bytes(good + b'{"paragraphs": 1}\n\xff\n')
    shutil.copy(source / "vocab.txt", tmp_path)
    said = []
    manifest = prepare(tmp_path, tmp_path / "run", log=said.append, max_bad_record_share=0.05)
    assert manifest["damaged_records"] == 2 and manifest["documents"] == 90
    assert "text: 1 file to read" in said[0]
    assert "a.jsonl, line 91: not a document" in said[2] and "line 92" in said[3]
    with pytest.raises(InputError, match="raise the limit with --max_bad_record_share"):
        prepare(tmp_path, tmp_path / "run2", max_bad_record_share=0.001)


def test_damaged_lines_are_counted_once_if_a_vocabulary_is_learned(source, tmp_path):
    """The text is read twice then."""
    good = (source / "text/b.txt").read_bytes()
    (tmp_path / "a.txt").write_bytes(good + b"\n\xff\nthe end\n")
    recipe = dataclasses.replace(find_recipe("bert-mini-demo"), vocabulary_size=100)
    said = []
    counted = records(log=said.append)
    folder = prepare_text.prepare_in_cache(
        str(tmp_path / "a.txt"),
        "",
        dataclasses.replace(recipe, max_bad_record_share=0.05),
        known_case=None,
        records=counted,
        cache_dir=str(tmp_path / "cache"),
        log=said.append,
    )
    manifest = json.loads(pathlib.Path(folder, "manifest.json").read_text())
    assert manifest["damaged_records"] == counted.bad == 1
    assert f"1 of {counted.good + 1:,} records were damaged and skipped" in said
    assert sum("not UTF-8" in line for line in said) == 1
    assert counted.good == len(good.splitlines()) + 1


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--sequence_lengths=99999999999999999999", "from 8 to 2147483647. Received: 9999999"),
        (f"--sequence_lengths=16,{'9' * 5_000}", "from 8 to 2147483647. Received: 9999999"),
        ("--sequence_lengths=7", "from 8 to 2147483647. Received: 7."),
        ("--sequence_lengths=16.0", "from 8 to 2147483647. Received: 16.0."),
        ("--workers=99999999999999999999", "--workers must be at most 4096. Received: --workers=9"),
    ],
)
def test_numbers_out_of_range_are_refused(source, tmp_path, capsys, flag, said):
    flags = [f"--input={source}/text", f"--vocab={source}/vocab.txt", f"--output={tmp_path}/run"]
    assert prepare_text.main([*flags, flag]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_errors_name_no_flag_that_the_preparation_lacks(source, tmp_path, monkeypatch):
    """It has no --data_dir, --cache_dir or --set."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("\n\n".join(WORDS))
    shutil.copy(source / "vocab.txt", tmp_path)

    def error(**changes):
        with pytest.raises(InputError) as caught:
            prepare(tmp_path, tmp_path / "run", **changes)
        return str(caught.value)

    said = error(sequence_lengths=[16])
    assert said.startswith("The text is too short: fewer than 2") and "--" not in said
    shutil.rmtree(tmp_path / "run/pages")

    def full(writer, name, page):
        raise writer._unwritable(OSError(errno.ENOSPC, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(pages.PagesWriter, "_write", full)
        assert error().endswith(
            " cannot be written: No space left on device. Free some space, and run the same "
            "command again: it continues where it stopped."
        )
    shard = tmp_path / "run/shard-00000.tfrecord"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    monkeypatch.setattr(prepare_text._Preparation, "_verify", lambda *arguments: True)
    said = error()
    assert said.endswith("Check the disk. The same command writes such a shard again.")


def test_a_preparation_without_a_finished_shard_begins_again_with_other_input(source, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_bytes(b"\xff\n")
    shutil.copy(source / "vocab.txt", tmp_path)
    with pytest.raises(InputError):
        prepare(tmp_path, tmp_path / "run")
    assert (tmp_path / "run/manifest.json").exists()
    shutil.copy(source / "text/a.jsonl", tmp_path / "text/a.jsonl")
    assert prepare(tmp_path, tmp_path / "run")["documents"] == 90


def test_endless_lines_and_documents_are_cut(monkeypatch, tmp_path):
    """A text without blank lines, or a very long line, does not take more memory."""
    monkeypatch.setattr(documents, "MAX_DOCUMENT_CHARACTERS", 100)
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 50)
    (tmp_path / "a.txt").write_text("a b c d e f g.\n" * 40 + "x" * 1000 + "\nthe end.\n")
    said = []
    found = list(documents.read_documents([str(tmp_path / "a.txt")], records(log=said.append)))
    assert 4 < len(found) < 8 and found[-1] == ["the end."]
    assert "line 41: longer than 50 bytes" in said[0]


def test_sentences_are_those_of_the_library(source):
    """Dropping the inside of plain words changes no sentence, whatever is between the words.

    The library cuts inside spaces of several bytes; those cuts are moved to the next character.
    """
    rng = random.Random(1)
    letters = list("aboxuXDBT3 8cs  :;.!?,()'\"=-_^…é。>*\u3000\u00a0\n") + ["the ", "cat, ", "So "]
    made = ["".join(rng.choices(letters, k=rng.randint(0, 60))) for _ in range(8_000)]
    made += ["We went to D.C. Then (so it seems...) we slept :c Disney XD is on. Is it? Yes!"]
    pieces = vocabulary.load_vocabulary(source / "vocab.txt")
    ours = word_pieces.Tokenizer(pieces, lower_case=True).break_sentences(made)
    _, starts, ends = tf_text.StateBasedSentenceBreaker().break_sentences_with_offsets(made)
    assert ours.row_lengths().numpy().tolist() == starts.row_lengths().numpy().tolist()
    for text, *row in zip(made, ours.to_list(), starts.to_list(), ends.to_list(), strict=True):
        borders = np.cumsum([0] + [len(character.encode()) for character in text])
        for sentence, start, end in zip(*row, strict=True):
            start, end = borders[np.searchsorted(borders, [start, end])]
            assert sentence == text.encode()[start:end] and isinstance(sentence.decode(), str)


SPACES = {
    "no-break": "\u00a0",
    "ideographic": "\u3000",
    "em": "\u2003",
    "line separator": "\u2028",
    "two": "\u00a0\u3000",
}


@pytest.mark.parametrize("lower_case", [True, False])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_the_first_word_after_any_space_is_known(space, lower_case):
    """Sentences that end before a space of several bytes have the word pieces of plain text."""
    text = "It rained all day. The cat slept. Nobody came home. Everything was quiet, story "
    words = ["It", "The", "Nobody", "Everything", *text.split(), ".", ",", *"0123456789"]
    words += [word.lower() for word in words]
    words = [word.rstrip(".,") or word for word in words] + [f"##{i}" for i in range(10)]
    tokenizer = word_pieces.Tokenizer(
        list(dict.fromkeys([*vocabulary.SPECIAL_TOKENS, *words])), lower_case=lower_case
    )
    plain = [[f"{text}{i}."] for i in range(40)]
    found = tokenizer([[paragraph.replace(" ", space)] for (paragraph,) in plain])
    expected = tokenizer(plain)
    assert not np.isin(found.tokens, 1).any() and found.unknown_characters == {}
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert expected.sentence_counts.tolist() == [4] * 40


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_the_share_of_unknown_words_is_told(source, tmp_path, workers):
    (tmp_path / "text").mkdir()
    lines = [f"the cat sat on the log {i} ." for i in range(20)]
    (tmp_path / "text/a.txt").write_text("\n\n".join(lines))
    shutil.copy(source / "vocab.txt", tmp_path)
    said = []
    manifest = prepare(tmp_path, tmp_path / "good", log=said.append, workers=workers)
    assert said[-1] == f"0 of {manifest['tokens']} tokens are [UNK] (0.00%)"
    lines[3] += " żaba żółw"
    lines[4] += " дом żaba."
    (tmp_path / "text/a.txt").write_text("\n\n".join(lines), encoding="utf-8")
    manifest = prepare(tmp_path, tmp_path / "bad", log=said.append, workers=workers)
    tokens = manifest["tokens"]
    assert manifest["unknown_tokens"] == manifest["shards"][0]["unknown_tokens"] == 4
    assert said[-1].startswith(f"Warning: 4 of {tokens} tokens are [UNK] ({4 / tokens:.2%})")
    # The accents are dropped with lower-casing; w and ł are no piece.
    assert "'b' U+0062 (2), 'z' U+007A (3)" not in said[-1]
    assert "'z' U+007A (3), " in said[-1] and "'д' U+0434 (1)" in said[-1]
    assert "'ż'" not in said[-1]


def test_words_that_are_too_long_are_told(source, tmp_path):
    pieces = vocabulary.load_vocabulary(source / "vocab.txt")
    said = []
    texts = [["0" * 801], ["0 1"], ["0 2"], ["0 3"]]
    corpora(texts, pieces, tmp_path, log=said.append)
    assert said[-1].startswith("Warning: 1 of 7 tokens are [UNK] (14.29%)")
    assert "words of more than 800 bytes" in said[-1]
