"""Cased and multilingual vocabularies: found out, tokenized as google-research/bert does."""

import json
import pathlib
import random

import pytest
import tensorflow as tf
from official.nlp.tools import tokenization

from inputs.errors import InputError
from inputs.squad.offsets import OffsetTokenizer
from inputs.text.tokenization import casing, vocabulary
from inputs.text.tokenization.characters import is_dropped
from inputs.text.tokenization.word_pieces import WordPieces

SHARED = pathlib.Path(__file__).parents[5] / "shared/data"
LETTERS = "abcenABCéÉñÑßẞ東京한글ệİıǅΣσςЖж\u212b½ﬁकिٱﾊﾟ々\u3400\U00020000"
PUNCTUATION = ",.!'-^`$🙂。"
INVISIBLE = "\u00ad\u200b\u200c\u200d\ufeff\u0600\u2060\U000e0001\U00013430"
CONTROLS = "\0\x01\x0b\x0c\x11\x1c\x7f\x85\x92\ufffd"
CHANGED = "ßẞİıǅΣς\u212b½ﬁﾊﾟ"  # lower-casing also case-folds them, or takes them apart (NFKC)
SPACES = " \t\n\r\u00a0\u1680\u2003\u2028\u3000"
ACCENTS = "\u0301\u0323"
PIECES = sorted(set(LETTERS + PUNCTUATION + ACCENTS))
CASED = [*vocabulary.SPECIAL_TOKENS, *PIECES, *(f"##{p}" for p in PIECES)]


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(1)
    letters = LETTERS + PUNCTUATION + INVISIBLE + CONTROLS + SPACES + ACCENTS
    made = ["".join(rng.choices(letters, k=rng.randrange(25))) for _ in range(5_000)]
    long = ["a" * 200, "한" * 200, "🙂" * 200, "🙂" * 201, "aé" * 401]
    return [*made, "", "Éa Cab", *long]


@pytest.mark.parametrize("lower_case", [True, False])
def test_text_is_cut_as_google_does(texts, tmp_path, lower_case):
    """Chinese characters are split, controls are dropped; with a cased vocabulary, case is kept."""
    if lower_case:
        texts = [text.translate(dict.fromkeys(map(ord, CHANGED))) for text in texts]
    vocabulary.save_vocabulary(CASED, tmp_path / "vocab.txt")
    reference = tokenization.FullTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lower_case)
    reference.wordpiece_tokenizer.max_input_chars_per_word = 200  # tf-models' copy has 400
    expected = [reference.tokenize(text) for text in texts]
    found = WordPieces(CASED, lower_case=lower_case).tokenize(texts).to_list()
    for text, ours, theirs in zip(texts, found, expected, strict=True):
        assert [CASED[i] for i in ours] == theirs, repr(text)
    assert ({"É", "C", "東"} <= {p for pieces in expected for p in pieces}) != lower_case


def test_a_long_word_of_short_letters_is_not_unknown():
    """Unlike in google-research/bert, which counts 200 characters instead of 800 bytes."""
    short, long = WordPieces(CASED, lower_case=False).tokenize(["a" * 800, "a" * 801]).to_list()
    assert len(short) == 800 and long == [CASED.index("[UNK]")]


def test_cased_pieces_have_the_offsets_of_their_characters(texts):
    tokenizer = OffsetTokenizer(CASED, lower_case=False)
    columns = [column.to_list() for column in tf.function(tokenizer.tokenize)(tf.constant(texts))]
    assert columns[0] == WordPieces(CASED, lower_case=False).tokenize(texts).to_list()
    seen = 0
    for text, *row in zip(texts, *columns, strict=True):
        for piece, start, end in zip(*row, strict=True):
            shown = text.encode()[start:end].decode()
            shown = "".join(c for c in shown if not is_dropped(c))
            assert CASED[piece] in (shown, f"##{shown}", vocabulary.UNK)
            seen += 1
    assert seen > 10_000


@pytest.mark.parametrize("lower_case", [True, False])
@pytest.mark.parametrize("space", ["\u00a0", "\u3000", "\u2003", "\u2028"])
def test_offsets_after_any_space(space, lower_case):
    """SQuAD contexts and the exported graph: the pieces of plain text, at exact places."""
    text = "Cab. Abc. Éa東 ab.".replace(" ", space)
    pieces = OffsetTokenizer(CASED, lower_case=lower_case).tokenize([text])
    ids, starts, ends = (column.to_list()[0] for column in pieces)
    plain = WordPieces(CASED, lower_case=lower_case).tokenize([text.replace(space, " ")])
    assert ids == plain.to_list()[0] and CASED.index("[UNK]") not in ids
    shown = [text.encode()[a:b].decode() for a, b in zip(starts, ends, strict=True)]
    assert "".join(shown) == text.replace(space, "")


def with_pieces(count, *pieces):
    return [*vocabulary.SPECIAL_TOKENS, *(f"word{i}" for i in range(count)), *pieces]


@pytest.mark.parametrize(
    ("pieces", "cased"),
    [
        (with_pieces(9), False),
        (with_pieces(9, "The"), True),
        (with_pieces(99, "[unused7]", "[E1]"), False),
        (with_pieces(9_999, *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"), False),
        (with_pieces(9_999, *(f"Word{i}" for i in range(200))), True),
        (with_pieces(20, "año"), True),
        (with_pieces(20, "##한국"), True),
        (with_pieces(20, *"東京ßж"), False),
    ],
)
def test_the_kind_of_a_vocabulary_is_found_out(pieces, cased):
    assert casing.is_cased(pieces) == cased
    assert casing.choose(None, pieces) == (not cased)
    assert casing.choose(True, pieces) is True and casing.choose(False, pieces) is False


def test_the_published_vocabulary_is_uncased():
    if not SHARED.exists():
        pytest.skip("../shared/data is not there")
    pieces = vocabulary.load_vocabulary(str(SHARED / "bert/vocab.txt"))
    assert casing.changed_pieces(pieces) == []


def test_pieces_that_cannot_occur_are_told():
    pieces = with_pieces(5, "The", "##É")
    line = casing.report(True, pieces)
    assert "2 of the 12 word pieces can never occur" in line and "'The', '##É'" in line
    assert casing.report(False, pieces) == "Text: capitals and accents kept (cased vocabulary)"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("recipe.json", {"lower_case": False}, False),
        ("recipe.json", {"name": "of an earlier version"}, True),
        ("tokenizer_config.json", {"do_lower_case": False, "model_max_length": 512}, False),
        ("tokenizer_config.json", {"do_lower_case": True}, True),
    ],
)
def test_what_a_checkpoint_was_trained_with(file, content, expected, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    known = casing.of_checkpoint(str(tmp_path))
    for pieces in (with_pieces(9), with_pieces(9, "The")):
        assert casing.choose(None, pieces, known) is expected
        assert casing.choose(expected, pieces, known) is expected
        with pytest.raises(InputError, match=rf"contradicts the checkpoint in .*{file}"):
            casing.choose(not expected, pieces, known)


def test_other_files_say_nothing(tmp_path):
    assert casing.of_checkpoint(str(tmp_path)) is None
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert casing.of_checkpoint(str(tmp_path)) is None
