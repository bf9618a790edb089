"""The SQuAD model: spans, loss, initial weights, and fine-tuning with train.py."""

import json

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from official.nlp.modeling import models as tfm_models
from official.nlp.modeling import networks

from export import weights
from inputs.errors import InputError
from inputs.squad import files as squad
from inputs.storage import remote
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS, save_vocabulary
from models import bert
from models import squad as span_model
from tasks import initial_weights

SIZE = bert.SIZES["tiny"]
WORDS = "who wrote it when where ada babbage in london paris 1843 1850 . ? the machine".split()
VOCABULARY = [*SPECIAL_TOKENS, *WORDS]
POSITIONS = 40


def test_best_spans_match_a_plain_loop():
    """A loop over pairs of the best starts and ends; some rows have fewer than `n_best` spans."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 6, 12)).astype(np.float32)
    begin, end = rng.random((2, 6, 12)) < 0.6
    begin[4], end[5] = False, False
    n_best, longest = 5, 3
    starts, ends, scores = span_model.best_spans(
        *logits, begin, end, n_best=n_best, max_answer_length=longest
    )
    for row in range(6):
        top = [
            sorted(np.nonzero(allowed[row])[0], key=lambda i, x=x: -x[row, i])[:n_best]
            for x, allowed in zip(logits, (begin, end), strict=True)
        ]
        pairs = [(logits[0, row, i] + logits[1, row, j], i, j) for i in top[0] for j in top[1]]
        pairs = sorted((p for p in pairs if 0 <= p[2] - p[1] < longest), reverse=True)[:n_best]
        valid = scores[row] > 0.5 * span_model.IMPOSSIBLE
        assert int(tf.reduce_sum(tf.cast(valid, tf.int32))) == len(pairs)
        assert [(int(i), int(j)) for i, j in zip(starts[row], ends[row], strict=True)][
            : len(pairs)
        ] == [(i, j) for _, i, j in pairs]
        np.testing.assert_allclose(scores[row][: len(pairs)], [p[0] for p in pairs], rtol=1e-6)


def make_labeler(positions=POSITIONS, size=SIZE):
    return span_model.build_span_labeler(
        size, len(VOCABULARY), positions, types=2, dropout=0.1, initializer_stddev=0.02
    )


def make_inputs(rows=3, length=20, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < rng.integers(8, length + 1, (rows, 1))
    inputs = {
        "input_word_ids": rng.integers(5, len(VOCABULARY), (rows, length)) * mask,
        "input_mask": mask,
        "input_type_ids": (np.arange(length) > 6) * mask,
    }
    return {key: tf.constant(value, tf.int32) for key, value in inputs.items()}


def test_sums_match_values_computed_from_the_logits():
    model, inputs = make_labeler(), make_inputs()
    batch = inputs | {
        "start_positions": tf.constant([3, 0, 2]),
        "end_positions": tf.constant([5, 0, 2]),
        "example_weights": tf.constant([1.0, 1.0, 0.0]),
    }
    logits = [model(inputs)[f"{key}_logits"].numpy().astype(np.float64) for key in ("start", "end")]
    best = [x.argmax(-1) for x in logits]
    batch["start_positions"] = tf.constant([int(best[0][0]), 0, 2])
    batch["end_positions"] = tf.constant([int(best[1][0]), 0, 2])
    loss = 0
    for x, labels in zip(logits, (batch["start_positions"], batch["end_positions"]), strict=True):
        shares = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
        loss -= sum(0.5 * np.log(shares[row, int(labels[row])]) for row in (0, 1))
    sums, counts = span_model.span_sums(model, batch, False), span_model.span_counts(batch)
    np.testing.assert_allclose(sums["span_loss"], loss, rtol=1e-5)
    right = 1 + (best[0][1] == 0 and best[1][1] == 0)
    assert (sums["span_accuracy"], counts["span"]) == (right, 2)


def tfm_encoder(layers=SIZE.layers, width=SIZE.width, rows=None):
    return networks.BertEncoder(
        vocab_size=rows or len(VOCABULARY),
        hidden_size=width,
        num_layers=layers,
        num_attention_heads=2,
        inner_dim=4 * width,
        max_sequence_length=POSITIONS,
        type_vocab_size=2,
        dict_outputs=True,
    )


def tfm_pretrainer(encoder):
    pretrainer = tfm_models.BertPretrainerV2(encoder_network=encoder)
    # Calling the model makes tf_keras warn about its inputs; building the head is enough.
    pretrainer.masked_lm.build([None, None, SIZE.width])
    return tf.train.Checkpoint(model=pretrainer, **pretrainer.checkpoint_items)


LAYOUTS = {
    "encoder key": lambda encoder: tf.train.Checkpoint(encoder=encoder),
    "model key": lambda encoder: tf.train.Checkpoint(model=encoder),
    "with its pre-training heads": tfm_pretrainer,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_of_tf_models_are_read(layout, tmp_path):
    """As in the published archives: bert_model.ckpt.index and .data, no `checkpoint` file."""
    encoder = tfm_encoder()
    LAYOUTS[layout](encoder).write(str(tmp_path / "bert_model.ckpt"))
    saved = initial_weights.find_encoder(str(tmp_path))
    assert saved.vocabulary_file == str(tmp_path / "vocab.txt")
    initial_weights.check_size(saved, "tiny", POSITIONS)
    model = make_labeler()
    variables = bert.encoder_variables(bert.encoder_of(model))
    for name, value in initial_weights.read_encoder(saved).items():
        variables.pop(name).assign(value)
    assert not variables
    inputs = make_inputs()
    ours = bert.encoder_of(model)(inputs)
    theirs = encoder(inputs)
    for key in ("sequence_output", "pooled_output"):
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-5)


def test_a_checkpoint_on_object_storage_is_read(tmp_path, ram):
    """By its folder and by its prefix, which ram:// takes for a folder."""
    tf.train.Checkpoint(encoder=tfm_encoder()).write(str(tmp_path / "bert_model.ckpt"))
    expected = initial_weights.read_encoder(initial_weights.find_encoder(str(tmp_path)))
    for path in tmp_path.iterdir():
        remote.upload(f"{ram}/{path.name}", path.read_bytes())
    for init_from in (ram, f"{ram}/bert_model.ckpt"):
        saved = initial_weights.find_encoder(init_from)
        assert saved.vocabulary_file == f"{ram}/vocab.txt"
        tf.nest.map_structure(
            np.testing.assert_array_equal, expected, initial_weights.read_encoder(saved)
        )
    remote.upload(f"{ram}/bert_model.ckpt.index", b"garbage")
    with pytest.raises(InputError, match="bert_model.ckpt cannot be read"):
        initial_weights.find_encoder(ram)


def test_tf_models_can_read_exported_weights(tmp_path):
    model = make_labeler()
    inputs, encoder = make_inputs(), bert.encoder_of(model)
    weights.save_encoder(encoder, str(tmp_path / "weights"))
    fresh = tfm_encoder()
    # As official.core.base_task reads `init_checkpoint`.
    newest = tf.train.latest_checkpoint(str(tmp_path / "weights"))
    status = tf.train.Checkpoint(encoder=fresh).read(newest)
    status.expect_partial().assert_existing_objects_matched()
    for key, value in encoder(inputs).items():
        if key != "encoder_outputs":
            np.testing.assert_allclose(fresh(inputs)[key], value, atol=1e-5)
    config = json.loads((tmp_path / "weights" / weights.CONFIG).read_text())
    assert config["max_position_embeddings"] == POSITIONS and config["initializer_range"] == 0.02


def test_an_unsuitable_checkpoint_is_refused(tmp_path):
    tf.train.Checkpoint(encoder=tfm_encoder()).write(str(tmp_path / "bert_model.ckpt"))
    saved = initial_weights.find_encoder(str(tmp_path))
    both = "2 layers, width 128 and 2 heads, but model=base has 12 layers, width 768 and 12"
    with pytest.raises(InputError, match=f"{both} heads. Give --set model=tiny"):
        initial_weights.check_size(saved, "base", 16)
    with pytest.raises(InputError, match="sequence_length=41: .* has only 40 rows"):
        initial_weights.check_size(saved, "tiny", 41)
    with pytest.raises(InputError, match="there is no checkpoint"):
        initial_weights.find_encoder(str(tmp_path / "nothing"))
    tf.train.Checkpoint(model=tf_keras.layers.Dense(1)).write(str(tmp_path / "other/ckpt"))
    with pytest.raises(InputError, match="has no BERT encoder.* MLPerf. Fine-tuning"):
        initial_weights.find_encoder(str(tmp_path / "other"))
    (tmp_path / "bert_model.ckpt.index").write_bytes(b"garbage")
    with pytest.raises(InputError, match="bert_model.ckpt cannot be read"):
        initial_weights.find_encoder(str(tmp_path))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with train.json, dev.json and vocab.txt; 60 contexts, of up to 40 words."""
    folder = tmp_path_factory.mktemp("squad")
    rng = np.random.default_rng(1)
    for name, number in (("train", 60), ("dev", 20)):
        paragraphs = []
        for i in range(number):
            person, place, year = (
                str(rng.choice(kind))
                for kind in (("Ada", "Babbage"), ("London", "Paris"), ("1843", "1850"))
            )
            padding = "The machine . " * int(rng.integers(0, 12))
            context = f"{padding}{person} wrote it in {place} in {year} ."
            asked = {"Who wrote it?": person, "Where?": place, "When?": year}
            qas = [
                {
                    "id": f"{name}-{i}-{question}",
                    "question": question,
                    "answers": [{"answer_start": context.index(answer), "text": answer}],
                }
                for question, answer in asked.items()
            ]
            paragraphs.append({"context": context, "qas": qas})
        content = {"data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{name}.json").write_text(json.dumps(content))
    save_vocabulary(VOCABULARY, str(folder / "vocab.txt"))
    return folder


SMALL = ["--recipe=squad-mini", "--global_batch_size=16", "--steps_per_loop=20"]
SMALL += ["--set", "model=tiny"]
SMALL += ["--set", "sequence_length=32", "--set", "max_query_length=8", "--set", "doc_stride=10"]


@pytest.mark.slow
def test_fine_tuning_a_pre_trained_run_answers_correctly(data, in_process, tmp_path, capfd):
    """The full pipeline: windows, loss, spans, answer texts, metrics and export."""
    pre, run = tmp_path / "pre", tmp_path / "run"
    tf_keras.utils.set_random_seed(1)
    pretrainer = bert.build_pretrainer(
        SIZE, len(VOCABULARY), POSITIONS, dropout=0.1, initializer_stddev=0.06
    )
    tf.train.Checkpoint(model=pretrainer).save(str(pre / "ckpt"))
    save_vocabulary(VOCABULARY, str(pre / "vocab.txt"))
    arguments = [*SMALL, f"--data_dir={data}", f"--model_dir={run}", "--steps=250"]
    arguments += ["--set", f"init_from={pre}", "--set", "peak_learning_rate=5e-3"]
    assert in_process(arguments, demonstrate=True) == 0
    captured = capfd.readouterr()
    assert f"Starting from the encoder in {pre}/ckpt-1" in captured.err
    assert "on all 60 dev questions" in captured.out and "Who wrote it?" in captured.out
    results = json.loads((run / "results.json").read_text())
    answers = json.loads((run / "predictions.json").read_text())
    dev = squad.read_squad(str(data / "dev.json"))
    assert set(answers) == {question.id for question in dev.questions}
    right = [answers[q.id] == q.answers[0][1] for q in dev.questions]
    assert results["exact_match"] == pytest.approx(100 * np.mean(right))
    assert results["f1"] >= results["exact_match"] > 80
    nbest = json.loads((run / "nbest.json").read_text())
    for key, best in nbest.items():
        texts, shares = [b["text"] for b in best], [b["probability"] for b in best]
        assert len(set(texts)) == len(texts) <= 20 and texts[0] == answers[key]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
    card = (run / "export/model_card.md").read_text()
    asked = f"{len(dev.questions)} questions to answer"
    for said in ("squad-mini", "exact_match", "tensorflow-text", dev.fingerprint, asked):
        assert said in card
    # The exported encoder can be used as initial weights.
    again = initial_weights.find_encoder(str(run / "export/tf_models"))
    assert (again.size, again.max_sequence_length) == (SIZE, POSITIONS)
    trained = initial_weights.read_encoder(initial_weights.find_encoder(str(run)))
    for name, value in initial_weights.read_encoder(again).items():
        np.testing.assert_array_equal(value, trained[name])


@pytest.mark.slow
def test_rows_of_padding_are_kept(data, in_process, tmp_path, capfd):
    """From a checkpoint of 24 rows for 21 pieces: through training, saving, resuming and export."""
    tf_keras.utils.set_random_seed(1)
    rows = 24
    assert len(VOCABULARY) == 21
    encoder = tfm_encoder(rows=rows)
    tf.train.Checkpoint(encoder=encoder).write(str(tmp_path / "pre/bert_model.ckpt"))
    save_vocabulary(VOCABULARY, str(tmp_path / "pre/vocab.txt"))
    run = tmp_path / "run"
    arguments = [*SMALL, f"--data_dir={data}", f"--model_dir={run}"]
    arguments += ["--set", f"init_from={tmp_path}/pre", "--set", "weight_decay=0"]
    for steps in (2, 4):  # the second one goes on from the first
        assert in_process([*arguments, f"--steps={steps}"]) == 0
        said = capfd.readouterr().err
        assert "has embeddings of 24 word pieces, 3 more than" in said
    assert "Going on from step 2 of 4" in said
    variables = bert.encoder_variables(encoder)
    (name,) = (name for name in variables if name.startswith("word_embeddings/"))
    given = variables[name].numpy()
    for place in ("", "export/tf_models"):
        saved = initial_weights.find_encoder(str(run / place))
        assert saved.vocabulary_size == rows
        kept = initial_weights.read_encoder(saved)[name]
        assert np.array_equal(kept[21:], given[21:]) and not np.array_equal(kept, given)
    config = json.loads((run / "export/tf_models" / weights.CONFIG).read_text())
    assert config["vocab_size"] == rows


NO_DATA = "no --data_dir"  # instead of a flag


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Give its folder with --set init_from=DIR"),
        (["--set", "init_from=@DATA"], "there is no checkpoint"),
        (["--set", "init_from=random"], "--vocab is needed with --set init_from=random"),
        (["--set", "init_from=random", "--vocab=@DATA/train.json"], "lacks [PAD], [UNK]"),
        (["--set", "init_from=@CKPT", "--set", "model=mini"], "width 128 and 2 heads, but model="),
        (["--set", "init_from=@CKPT", "--set", "sequence_length=41"], "has only 40 rows"),
        (["--set", "init_from=@CKPT"], "--vocab is needed: there is no vocab.txt beside"),
        (["--set", "init_from=@CKPT", "--vocab=@LONG"], "has 22 word pieces, but"),
        (["--set", "init_from=@CKPT", "--vocab=@VOCAB", NO_DATA], "SQuAD needs a folder"),
        (
            ["--set", "init_from=random", "--vocab=@VOCAB", "--set", "sequence_length=513"],
            "the position table has only 512 rows",
        ),
        (["--set", "max_query_length=29"], "must leave room for the context"),
        (["--set", "doc_stride=0"], "doc_stride must be at least 1"),
        (["--set", "init_form=x"], "Did you mean 'init_from'"),
    ],
)
def test_a_mistake_is_reported_in_one_line(arguments, said, data, tmp_path, in_process, capfd):
    tf.train.Checkpoint(encoder=tfm_encoder()).write(str(tmp_path / "pre/bert_model.ckpt"))
    save_vocabulary([*VOCABULARY, "more"], str(tmp_path / "long.txt"))
    places = {"@DATA": data, "@CKPT": tmp_path / "pre", "@LONG": tmp_path / "long.txt"}
    places["@VOCAB"] = data / "vocab.txt"
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    given = [] if NO_DATA in arguments else [f"--data_dir={data}"]
    arguments = [argument for argument in arguments if argument != NO_DATA]
    assert in_process([*SMALL, *given, f"--model_dir={tmp_path}/run", *arguments]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.glob("run/*.json")) and not list(tmp_path.glob("run/ckpt*"))
