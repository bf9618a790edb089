"""Reading text files into documents, and the messages about damaged files."""

import gzip
import json
import re

import pytest

from inputs.bad_records import BadRecords
from inputs.errors import InputError
from inputs.text import documents, files
from inputs.text.tokenization import installed_text, vocabulary
from inputs.text.tokenization.word_pieces import WordPieces

LATIN1 = "a line\ncaf\xe9 au lait\n".encode("latin-1")


def read(*paths, max_share=0.001, skip=True, log=print):
    records = BadRecords(max_share, skip=skip, log=log)
    found = files.find_files(",".join(map(str, paths)))
    return list(documents.read_documents(found, records))


def test_blank_lines_end_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("\n\nOne.\nTwo.\n\n \nThree.\r\n", encoding="utf-8")
    assert read(tmp_path / "a.txt") == [["One.", "Two."], ["Three."]]


def test_a_vocabulary_is_text_only_if_it_is_named(tmp_path):
    (tmp_path / "a[1].txt").write_text("One.")
    (tmp_path / "vocab.txt").write_text("[PAD]")
    assert read(tmp_path) == read(tmp_path / "*.txt") == read(tmp_path / "a[1].txt") == [["One."]]
    assert read(tmp_path / "vocab.txt") == [["[PAD]"]]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n', encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("Two.", encoding="utf-8-sig")
    assert read(tmp_path) == [["One."], ["Two."]]


def test_an_unusable_file_is_skipped_up_to_the_limit(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(["A line."] * 10))
    (tmp_path / "b.txt").write_text(" ")
    said = []
    assert read(tmp_path, max_share=0.2, log=said.append) == [["A line."] * 10]
    assert "b.txt holds no text" in said[0]
    with pytest.raises(InputError, match="b.txt holds no text. Including it, 1 of 12 records"):
        read(tmp_path, max_share=0.05)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("z.txt.gz", b"plain", "Including it, 1 of 1 records of the file are damaged"),
        (
            "z.txt",
            LATIN1[7:] * 3 + b"a line\n" * 2,
            "line 1, byte 3: not UTF-8 .0xe9.. Including it, 3 of 5",
        ),
        ("z.jsonl", b'{"text": "x"}\n{"title": "x"}\nz', "not a document.* Including it, 2 of 3"),
    ],
)
def test_a_wrong_file_is_not_within_the_tolerance(tmp_path, name, content, said):
    """One wrong file among many good lines; the share of damaged records is far below the limit."""
    (tmp_path / "a.txt").write_text("A line.\n" * 2_000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{said}.*probably has another format"):
        read(tmp_path, max_share=0.1)
    assert read(tmp_path, max_share=1.0)


ENGLISH, RUSSIAN = "It rained.\r\nAll day.\r\n", "Шёл дождь.\nВесь день.\n"


@pytest.mark.parametrize(
    ("encoding", "mark", "said"),
    [
        ("utf-16", b"", "is UTF-16, not UTF-8: its first bytes are a byte-order mark"),
        ("utf-16-be", b"\xfe\xff", "is UTF-16, not UTF-8: its first bytes are a byte-order mark"),
        ("utf-32", b"", "is UTF-32, not UTF-8: its first bytes are a byte-order mark"),
        ("utf-32-be", b"\0\0\xfe\xff", "is UTF-32, not UTF-8"),
        ("utf-16-le", b"", "is UTF-16LE, not UTF-8: 48% of its first line are NUL bytes"),
        ("utf-16-be", b"", "is UTF-16BE, not UTF-8: 50% of its first line are NUL bytes"),
        ("utf-32-le", b"", "is UTF-32LE, not UTF-8: 73% of its first line are NUL bytes"),
        ("utf-32-be", b"", "is UTF-32BE, not UTF-8: 75% of its first line are NUL bytes"),
    ],
)
@pytest.mark.parametrize("name", ["b.txt", "b.txt.gz", "b.jsonl"])
def test_other_encodings_are_named(tmp_path, encoding, mark, said, name):
    """With the command that converts the file, although the tolerance would allow it."""
    (tmp_path / "a.txt").write_text("A line.\n" * 20_000)
    content = mark + ENGLISH.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(InputError) as error:
        read(tmp_path)
    message = str(error.value)
    assert f"{tmp_path}/{name} {said}" in message and "\n" not in message
    known = said.split(",")[0].removeprefix("is ")
    assert f"`iconv -f {known} -t UTF-8" in message
    assert mark + ENGLISH.encode(encoding) == content  # iconv's names are Python's
    assert content.decode(known).removeprefix("\ufeff") == ENGLISH


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_in_any_script_is_an_error(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("A line.\n" * 20_000)
    (tmp_path / "b.txt").write_bytes((RUSSIAN * 20).encode(encoding))
    with pytest.raises(InputError, match="b.txt.* records of the file are damaged"):
        read(tmp_path)


def test_a_line_with_a_nul_is_damaged(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\nTw\0o.\nThree.\nFour.\n")
    said = []
    assert read(tmp_path, max_share=0.3, log=said.append) == [["One.", "Three.", "Four."]]
    assert "a.txt, line 2, byte 7: a NUL" in said[0]


def test_a_block_of_nuls_is_a_damaged_line_and_no_encoding(tmp_path):
    """A crash leaves such blocks; `iconv` would make nothing of them."""
    for nuls, said in ((512, "a.txt, line 1, byte 0: a NUL"), (31, "line 1, byte 0: a NUL")):
        (tmp_path / "a.txt").write_bytes(bytes(nuls) + b"One line.\nTwo.\nThree.\nFour.\n")
        told = []
        assert read(tmp_path, max_share=0.3, log=told.append) == [["Two.", "Three.", "Four."]]
        assert said in told[0]
    (tmp_path / "a.txt").write_bytes(bytes(4096))
    with pytest.raises(InputError, match="1 of 1 records of the file are damaged"):
        read(tmp_path)


def test_json_lines_hold_paragraphs_or_text(tmp_path):
    lines = [{"paragraphs": ["One.", " ", "Two."]}, {"id": 1, "text": "Three.\nFour."}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == [["One.", "Two."], ["Three.", "Four."]]


def test_folders_globs_and_gzip_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    with gzip.open(tmp_path / "deep/b.txt.gz", "wt") as file:
        file.write("B.")
    (tmp_path / "a.txt").write_text("A.")
    (tmp_path / "notes.md").write_text("not text by its name")
    assert read(tmp_path) == [["A."], ["B."]]
    assert read(tmp_path / "deep/*.gz", tmp_path / "a.txt") == [["B."], ["A."]]


TORN_GZIP = gzip.compress(b"words " * 999, mtime=0)[:40]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", LATIN1, "line 2, byte 10: not UTF-8 (0xe9)"),
        ("a.txt.gz", b"plain text", "named .gz but is not a complete gzip file"),
        ("a.txt.gz", TORN_GZIP, "named .gz but is not a complete gzip file"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"title": "x"}', "line 1: not a document"),
        ("a.jsonl", b'["x"]', "line 1: not a document"),
        ("a.jsonl", b'{"paragraphs": [1]}', "line 1: not a document"),
        ("a.jsonl", b'{"paragraphs": []}', "holds no text"),
        ("a.jsonl", b'{"paragraphs": ["x"], "text": "y"}', "both `paragraphs` and `text`"),
        ("a.jsonl", rb'{"text": "x\u0000"}', "line 1: a NUL, which text does not have"),
        ("a.jsonl", rb'{"text": "\ud83d"}', "line 1: half of a surrogate pair"),
    ],
)
def test_errors_in_a_file_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert said in str(error.value) and name in str(error.value)


def test_damaged_lines_are_named_and_skipped(tmp_path):
    """In text, JSON lines and a truncated gzip file; all undamaged lines are read."""
    (tmp_path / "a.txt").write_bytes(b"One.\nTw\xf0.\nThree.\n\n" + b"More.\n\n" * 500)
    lines = [json.dumps({"text": f"Text {i}."}) for i in range(500)]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[:200], lines[200][:9], *lines[201:]]))
    whole = gzip.compress(b"".join(b"%d\n\n" % (i * i) for i in range(99_999)))
    (tmp_path / "c.txt.gz").write_bytes(whole[:-1000])
    said = []
    found = read(tmp_path, log=said.append)
    assert found[0] == ["One.", "Three."] and found[500] == ["More."]
    assert [["Text 199."], ["Text 201."]] == found[700:702]
    assert len(found) > 1_000 + 90_000
    assert "a.txt, line 2, byte 7: not UTF-8 (0xf0)" in said[0]
    assert "b.jsonl, line 201: not JSON" in said[1]
    assert "c.txt.gz, up to line" in said[2] and "is damaged" in said[2]
    assert said[3].startswith("3 of ") and "damaged and skipped" in said[3]


def test_too_many_damaged_lines_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"A line.\n" * 998 + b"\xff\n\xfe\n")
    with pytest.raises(InputError, match="2 of 1,000 records are damaged, more than"):
        read(tmp_path / "a.txt")
    assert len(read(tmp_path / "a.txt", max_share=0.002)[0]) == 998
    with pytest.raises(InputError, match="line 999, byte 7984: not UTF-8.*on_bad_record=skip"):
        read(tmp_path / "a.txt", skip=False)
    (tmp_path / "a.txt").write_bytes(b"\xff\n" * 5_000)  # reading stops early
    with pytest.raises(InputError, match="1,000 of 1,000 records are damaged"):
        read(tmp_path / "a.txt")


def test_a_gzip_file_that_is_damaged_in_the_middle(tmp_path):
    """Only the checksum shows a changed byte; after an undecodable block the rest is lost."""
    lines = b"".join(b"%d\n" % (i**3 % 10**9) for i in range(50_000))
    content = bytearray(gzip.compress(lines, 0))  # blocks of at most 64 KiB, not compressed
    middle = len(content) // 2
    content[middle] ^= 1
    (tmp_path / "a.txt.gz").write_bytes(content)
    said = []
    read(tmp_path / "a.txt.gz", log=said.append)
    assert "a.txt.gz, up to line" in said[0] and "CRC check failed" in said[0]
    content[middle : middle + 2**16] = b"1" * 2**16  # includes the start of a block
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(InputError, match="the gzip file is damaged") as error:
        read(tmp_path / "a.txt.gz")
    bad, total = re.search(r"it, ([\d,]+) of ([\d,]+) records", str(error.value)).groups()
    assert 0.3 < int(bad.replace(",", "")) / int(total.replace(",", "")) < 0.6


@pytest.mark.parametrize("entry", ["missing", "missing.txt", "*.txt", ""])
def test_nothing_found_names_the_entry(tmp_path, entry):
    with pytest.raises(InputError, match="holds no text"):
        read(tmp_path / entry)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match="a.csv is not of a kind .*pandas.read_csv\\(.*a.csv.\\)"):
        read(tmp_path / "a.csv")


def test_installed_text_is_prose_without_repetitions():
    first = [next(source) for source in [installed_text.read_installed_text()] for _ in range(300)]
    again = [next(source) for source in [installed_text.read_installed_text()] for _ in range(300)]
    paragraphs = [paragraph for document in first for paragraph in document]
    assert first == again
    assert len({paragraph.lower() for paragraph in paragraphs}) == len(paragraphs)
    assert not any(">>>" in paragraph for paragraph in paragraphs)


def test_learning_a_vocabulary_is_deterministic(tmp_path):
    texts = ["the cat sat on the mat", "The dog sat on the log", "a cat and a dog"] * 20
    pieces = vocabulary.learn_vocabulary(texts, 60, lower_case=True)
    assert pieces == vocabulary.learn_vocabulary(texts, 60, lower_case=True)
    assert set(vocabulary.SPECIAL_TOKENS) < set(pieces) and "the" in pieces and len(pieces) <= 60
    vocabulary.save_vocabulary(pieces, tmp_path / "vocab.txt")
    assert vocabulary.load_vocabulary(tmp_path / "vocab.txt") == pieces


@pytest.mark.parametrize("lower_case", [True, False])
def test_a_learned_vocabulary_has_the_words_of_the_tokenizer(tmp_path, lower_case):
    """Whatever white space is between them, and without the characters that BERT drops."""
    odd = ["the\u00a0cat\u2028sat", "the\u3000ca\x11t\u1680s\u200bat", "th\ufffde cat\x7f sat"]
    pieces = vocabulary.learn_vocabulary(odd * 20, 60, lower_case=lower_case)
    plain = vocabulary.learn_vocabulary(["the cat sat"] * 60, 60, lower_case=lower_case)
    assert pieces == plain and "cat" in pieces
    vocabulary.save_vocabulary(pieces, tmp_path / "vocab.txt")
    assert vocabulary.load_vocabulary(tmp_path / "vocab.txt") == pieces
    assert WordPieces(pieces, lower_case=lower_case).tokenize(odd).to_list() == [
        [pieces.index(word) for word in ("the", "cat", "sat")]
    ] * len(odd)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"lacks \[MASK\]"),
        (
            "\n".join([*vocabulary.SPECIAL_TOKENS, "x", "[unused6]", "x", ""]).encode(),
            r"'x' in line 6 and in line 8, .*that of the last line\. Ids are line numbers.*"
            r"Replace line 6 by \[unused7\]\. Only a vocabulary that no checkpoint",
        ),
        (
            "\n".join([*vocabulary.SPECIAL_TOKENS, "x", "", "y"]).encode(),
            r"line 7 is blank.*one lower.*Replace line 7 by \[unused7\]\. Only a vocabulary",
        ),
        *(
            ("\n".join([*vocabulary.SPECIAL_TOKENS, "x", piece, "y"]).encode(), said)
            for piece, said in [
                (" \t", "line 7 is blank"),
                ("x ", "'x' in line 6 and in line 7"),
                ("new york", r"line 7: 'new york' has white space inside.*line 7 by \[unused7\]"),
                ("the\t1", r"line 7: 'the\\t1' has white space inside"),
                ("a\0b", "line 7: .* has a control character"),
                ("\x11", "line 7: .* has a control character"),
                ("##" + "é" * 129, "line 7: '##ééé.* has more than the 256 bytes"),
            ]
        ),
        (b"caf\xe9", "cannot be read as UTF-8"),
        (b"\xff\xfe", "is UTF-16, not UTF-8.*iconv -f UTF-16 -t UTF-8 .*vocab.txt > NEW"),
        ("[PAD]".encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
    ],
)
def test_errors_in_a_vocabulary_are_named(tmp_path, content, said):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(InputError, match=said):
        vocabulary.load_vocabulary(tmp_path / "vocab.txt")


def test_white_space_around_pieces_is_dropped(tmp_path):
    pieces = [*vocabulary.SPECIAL_TOKENS, "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("".join(f" {piece} \t\n" for piece in pieces))
    assert vocabulary.load_vocabulary(tmp_path / "vocab.txt") == pieces


def test_the_pieces_that_are_accepted_are_those_of_the_library(tmp_path):
    """With one that it refuses, the processes that tokenize would end without a reason."""
    odd = ["##\x11", "a\x11", "\x01", "\x7f", "\ufffd", "##", "##" + "é" * 128, "a.b"]
    vocabulary.save_vocabulary([*vocabulary.SPECIAL_TOKENS, *odd], tmp_path / "vocab.txt")
    pieces = vocabulary.load_vocabulary(tmp_path / "vocab.txt")
    assert pieces[5:] == odd
    WordPieces(pieces, lower_case=True)
    for refused in ("\x11", "a\0", "é" * 129):
        with pytest.raises(RuntimeError):
            WordPieces([*pieces, refused], lower_case=True)


def test_no_vocabulary_without_words():
    with pytest.raises(InputError, match="has no word to learn"):
        vocabulary.learn_vocabulary([], 100, lower_case=True)
