"""Which files of a folder are read as text, how they are opened, and what is said of the others."""

import bz2
import gzip
import json
import lzma
import os

import pytest

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.storage import files as storage
from inputs.text import files
from inputs.text.documents import read_documents


def make(folder, **contents):
    """Writes text files; `a__b` names the file a/b."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def found(entry, top=None):
    """(files relative to `top`, the lines that were said about them)."""
    said = []
    paths = files.find_files(str(entry), log=said.append)
    return [os.path.relpath(path, top or entry) for path in paths], said


def read(entry):
    records = BadRecords(0.0, skip=True, log=print)
    return list(read_documents(files.find_files(str(entry)), records))


def test_hidden_and_system_files_are_no_text(tmp_path):
    contents = {
        "a.txt": "One.",
        "._a.txt": "\5\26",
        ".ipynb_checkpoints/a-checkpoint.txt": "Old.",
        "__MACOSX/a.txt": "x",
        "lost+found/a.txt": "x",
        "Thumbs.db": "x",
    }
    make(tmp_path, **contents)
    names, said = found(tmp_path)
    assert names == ["a.txt"]
    assert said == [f"{tmp_path}: 1 file to read; 5 passed over: 5 × hidden"]
    assert found(tmp_path / "**", tmp_path)[0] == ["a.txt"]
    assert read(tmp_path / "._a.txt") == [["\5\26"]]  # it is named


def test_links_are_followed_and_each_folder_is_read_once(tmp_path):
    make(tmp_path / "data", **{"own/a.txt": "A.", "own/deep/b.txt": "B."})
    make(tmp_path / "elsewhere", **{"c.txt": "C.", "more/d.txt": "D."})
    data = tmp_path / "data"
    (data / "link").symlink_to(tmp_path / "elsewhere")
    (data / "again").symlink_to(tmp_path / "elsewhere/more")
    (data / "first").symlink_to(data / "own")  # sorts before `own`
    (data / "own/deep/up").symlink_to(data)
    (data / "itself").symlink_to(data / "itself")
    (data / "e.txt").symlink_to(tmp_path / "elsewhere/c.txt")
    names, said = found(data)
    once = ["again/d.txt", "e.txt", "link/c.txt", "own/a.txt", "own/deep/b.txt"]
    assert names == once
    assert said == [f"{data}: 5 files to read; 1 passed over: 1 × without a suffix"]
    assert found(data / "**/*.txt", data)[0] == once
    (data / "f.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="f.txt cannot be read: No such file"):
        read(data)


def test_two_stars_stand_for_any_folders(tmp_path):
    contents = {name: "x" for name in ("a.txt", "deep/b.txt", "deep/er/c.txt", "deep/er/d.jsonl")}
    make(tmp_path, **contents)
    assert found(tmp_path / "**/*.txt", tmp_path)[0] == ["a.txt", "deep/b.txt", "deep/er/c.txt"]
    assert found(tmp_path / "deep/**/*.txt", tmp_path)[0] == ["deep/b.txt", "deep/er/c.txt"]
    assert found(tmp_path / "d*/**/c.*", tmp_path)[0] == ["deep/er/c.txt"]
    assert len(found(tmp_path / "**", tmp_path)[0]) == 4
    assert found(tmp_path / "**/er", tmp_path)[0] == ["deep/er/c.txt", "deep/er/d.jsonl"]
    assert found(tmp_path / "*/er", tmp_path)[0] == ["deep/er/c.txt", "deep/er/d.jsonl"]
    os.chdir(tmp_path)
    assert files.find_files("**/c.txt") == ["deep/er/c.txt"]


def test_what_is_passed_over_is_said(tmp_path):
    names = ["B.TXT", "a.txt", "c.Jsonl.GZ", "d.parquet", "E.PARQUET", "f.xml.bz2", "vocab.txt"]
    make(tmp_path, **dict.fromkeys(names, b"A."), README="x")
    make(tmp_path / "theirs", **{"manifest.json": '{"version": 1}', "g.txt": "G."})
    ours = make(tmp_path / "ours", **{"manifest.json": '{"format": "tf_lamb tokenised text"}'})
    make(ours, **{"h.txt": "H."})
    (tmp_path / "c.Jsonl.GZ").write_bytes(gzip.compress(b'{"text": "C."}'))
    chosen, said = found(tmp_path)
    assert chosen == ["B.TXT", "a.txt", "c.Jsonl.GZ", "theirs/g.txt"]
    assert "4 files to read; 7 passed over: 2 × .parquet, " in said[0]
    for kind in (".xml.bz2", "vocab.txt", ".json", "without a suffix", "folder of prepared shards"):
        assert f"1 × {kind}" in said[0]
    assert read(tmp_path) == [["A."], ["A."], ["C."], ["G."]]
    assert read(tmp_path / "theirs") == [["G."]]  # --data_dir itself
    with pytest.raises(InputError, match="ours holds prepared shards"):
        read(tmp_path / "o*")


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", None)],
)
def test_compressed_files(tmp_path, suffix, compress):
    """Also of several members, as pbzip2 and `cat` make them, and with a cut end."""
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        compress = zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.txt{suffix}"
    numbers = [str(i**5) for i in range(20_000)]
    half = len(numbers) // 2
    parts = ["\n\n".join(part).encode() for part in (numbers[:half], numbers[half:])]
    whole = compress(parts[0] + b"\n\n") + compress(parts[1])
    path.write_bytes(whole)
    assert read(tmp_path) == [[number] for number in numbers]
    path.write_bytes(whole[:-2_000])
    said = []
    documents = list(read_documents([str(path)], BadRecords(0.5, skip=True, log=said.append)))
    assert documents[:half] == [[number] for number in numbers[:half]]
    assert f"a.txt{suffix}, up to line" in said[0] and "file is damaged" in said[0]
    path.write_bytes(b"plain text")
    with pytest.raises(InputError, match=rf"a.txt{suffix} is named {suffix} but is not a complete"):
        read(tmp_path)


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    make(tmp_path, **{"a.txt.zst": b"x"})
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"a.txt.zst: reading .zst needs .* pip install zstandard"):
        read(tmp_path)


# What WikiExtractor 3.0.5 writes: attardi/wikiextractor, wikiextractor/extract.py.
WIKI = """\
<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="A &amp; B">
A &amp; B

The first is 1 &lt; 2.

The second.

</doc>
<doc id="13" url="https://en.wikipedia.org/wiki?curid=13" title="Empty">
Empty


</doc>
<doc id="14" url="https://en.wikipedia.org/wiki?curid=14" title="C">
C

C
The end.
</doc>
"""
ARTICLES = [["The first is 1 < 2.", "The second."], ["C", "The end."]]


@pytest.mark.parametrize("kind", ["text", "text, bz2", "JSON", "JSON, bz2", "renamed"])
def test_both_formats_of_wikiextractor(tmp_path, kind):
    content = WIKI
    if "JSON" in kind:
        texts = ["The first is 1 &lt; 2.\n\nThe second.", "", "C\nThe end."]
        facts = {"id": "12", "revid": "1", "url": "https://en.wikipedia.org/wiki?curid=12"}
        content = "".join(json.dumps(facts | {"title": "A", "text": t}) + "\n" for t in texts)
    name = "AA/wiki_00.txt" if kind == "renamed" else "AA/wiki_00"
    if "bz2" in kind:
        make(tmp_path, **{f"{name}.bz2": bz2.compress(content.encode())})
    else:
        make(tmp_path, **{name: content})
    make(tmp_path, **{"AB/wiki_07": WIKI, "AB/wiki_08": "neither"})
    assert read(tmp_path) == ARTICLES + ARTICLES
    assert read(tmp_path / "A*") == ARTICLES + ARTICLES
    assert "1 passed over" in found(tmp_path)[1][0]


def test_a_named_file_of_wikiextractor_may_have_any_name(tmp_path):
    assert read(make(tmp_path, extracted=WIKI) / "extracted") == ARTICLES


@pytest.mark.parametrize("title", ["Anarchism", 'A "B" C', '"x" y="z"', 'say a="b"', "", "A>B"])
@pytest.mark.parametrize("more", ["", ' language="en" revision="99"', " "])
def test_headers_of_other_versions_of_wikiextractor(tmp_path, title, more):
    header = f'<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="{title}"{more}>'
    make(tmp_path, wiki_00=f"{header}\n{title}\n\nThe text.\n</doc>\n" * 2)
    assert read(tmp_path) == [["The text."]] * 2


def test_a_header_of_another_form_is_damaged(tmp_path):
    other = "<doc id='15' url='u' title='D'>"
    make(tmp_path, wiki_00=WIKI + f"{other}\nD\n\nThe text.\n</doc>\n")
    said = []
    records = BadRecords(0.1, skip=True, log=said.append)
    documents = list(read_documents([str(tmp_path / "wiki_00")], records))
    assert documents == [*ARTICLES, ["D", "The text."]] and records.bad == 1
    assert "wiki_00, line 20: not WikiExtractor's <doc id=" in said[0]


def test_json_with_a_document_per_line(tmp_path):
    """C4 has names such as c4-train.00000-of-01024.json.gz."""
    line = json.dumps({"text": "One.", "url": "x"}).encode() + b"\n"
    make(tmp_path, **{"c4-train.00000-of-01024.json.gz": gzip.compress(line + line)})
    make(tmp_path, **{"info.json": '{"name": "c4"}', "b.json": '{\n "text": "x"\n}'})
    assert read(tmp_path) == [["One."], ["One."]]
    assert "2 passed over: 2 × .json" in found(tmp_path)[1][0]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.parquet", r"pandas.read_parquet\('/.*a.parquet'\)\[\['text'\]\]"),
        ("enwiki-latest-pages-articles.xml.bz2", "wikiextractor.WikiExtractor /.*xml.bz2 -o"),
        ("CC-MAIN-2024-00000.warc.wet.gz", "is a web archive"),
        ("books.tar.gz", "Unpack it"),
        ("a.json", "one such object per line"),
        ("page.HTML", "Convert it to plain text"),
        ("part_0.hdf5", "is an HDF5 file"),
        ("wiki.train.tokens", "blank line between documents, give it a name that ends in .txt"),
    ],
)
def test_the_advice_fits_the_kind_of_file(tmp_path, name, advice):
    make(tmp_path, **{name: "x"})
    for entry in (tmp_path / name, tmp_path, tmp_path / "*"):
        with pytest.raises(InputError, match=rf"^--data_dir: .*{name} is not of a kind.*{advice}"):
            read(entry)
        with pytest.raises(InputError, match="TFRecord files of masked .*See docs/guides/your"):
            read(entry)
    with pytest.raises(InputError, match=f"^--input: .*{name} is not of a kind") as caught:
        files.find_files(str(tmp_path), "--input")
    assert "masked examples" not in str(caught.value)


def test_empty_files_of_no_kind_are_said_to_be_empty(tmp_path):
    """As after a download of MLPerf's records that failed."""
    make(tmp_path, eval_10k="", **{"part-0": "", "vocab.txt": "[PAD]"})
    message = "^--data_dir: .*eval_10k and 1 more: an empty file has no records and no text. Copy"
    with pytest.raises(InputError, match=message):
        read(tmp_path)
    with pytest.raises(InputError, match="^--data_dir: .*part-0: an empty file has no records"):
        read(tmp_path / "part-0")
    make(tmp_path, **{"part-0": "x"})
    with pytest.raises(InputError, match="part-0 is not of a kind that is read as text"):
        read(tmp_path)
    with pytest.raises(InputError, match="does not exist, .* or TFRecord files of masked examples"):
        read(tmp_path / "nothing")


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, **{"a.txt": "A.", "secret/b.txt": "B."})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", refuse)
    with pytest.raises(InputError, match="--data_dir: .*secret cannot be read .Permission denied"):
        read(tmp_path)


def test_text_on_object_storage_is_found_and_read(monkeypatch):
    """Files, globs and folders; a glob reads no folder in which nothing can match."""
    top = "ram://text/data"
    contents = {
        "a.txt": b"A.\n\nB.\n",
        "deep/b.txt.gz": gzip.compress(b"C.\n"),
        "deep/c.bz2": b"",
        "deep/down/d.jsonl.xz": lzma.compress(b'{"text": "D."}\n'),
        "other/e.txt": b"E.\n",
        ".hidden/f.txt": b"F.\n",
    }
    for name, content in contents.items():
        storage.make_folder(os.path.dirname(f"{top}/{name}"))
        with storage.atomic_write(f"{top}/{name}", "wb") as file:
            file.write(content)
    names, said = found(top)
    assert names == ["a.txt", "deep/b.txt.gz", "deep/down/d.jsonl.xz", "other/e.txt"]
    assert said == [f"{top}: 4 files to read; 2 passed over: 1 × hidden, 1 × .bz2"]
    assert read(top) == [["A."], ["B."], ["C."], ["D."], ["E."]]
    assert found(f"{top}/**/*.gz", top)[0] == ["deep/b.txt.gz"]
    listed = []
    scan = storage.remote.list_folder
    monkeypatch.setattr(
        storage.remote, "list_folder", lambda path: listed.append(path) or scan(path)
    )
    assert found(f"{top}/d*/*.gz", top)[0] == ["deep/b.txt.gz"]
    assert listed == [top, f"{top}/deep"]
    assert found(f"{top}/d*", top)[0] == ["deep/b.txt.gz", "deep/down/d.jsonl.xz"]
    for entry in (f"{top}/none.txt", f"{top}/*.text"):
        with pytest.raises(InputError, match="does not exist, or holds no text"):
            files.find_files(entry)
    with pytest.raises(InputError, match=r"^--data_dir: foo://a/b cannot be read \(this Tensor"):
        files.find_files("foo://a/b")
