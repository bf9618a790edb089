"""A model's answers to all questions of a SQuAD file, and the official metrics of them."""

import functools
import itertools
import json
import os

import numpy as np
import tensorflow as tf
from official.nlp.tools import squad_evaluate_v1_1

from inputs.order import with_one_graph
from inputs.storage.files import atomic_write
from models import squad as span_model


def predict_spans(model, strategy, features, recipe, global_batch_size: int) -> dict:
    """Computes the best spans of all windows, on the strategy's replicas.

    Returns:
        A dictionary of NumPy arrays, sorted by `feature`. `feature`: [F], indices of windows in
        `features`; `begin`, `end`: [F, n], positions of word pieces, counted from the start of the
        window's context; `score`: [F, n], below 0.5 * `IMPOSSIBLE` where there is no span.
    """
    # On a TPU `strategy.run` already compiles the whole replica function.
    on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    compiled = (
        _best_of_rows if on_tpu else tf.function(_best_of_rows, jit_compile=True, autograph=False)
    )

    @functools.partial(tf.function, autograph=False)
    def step(batch):
        # The lambda is needed: `strategy.run` traces a `tf.function` for the first replica only.
        spans = strategy.run(lambda batch: compiled(model, recipe, batch), args=(batch,))
        return {key: strategy.gather(value, axis=0) for key, value in spans.items()}

    batches = strategy.distribute_datasets_from_function(
        with_one_graph(lambda context: features.prediction_batches(global_batch_size, context))
    )
    parts = [{key: value.numpy() for key, value in step(batch).items()} for batch in batches]
    spans = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    order = np.argsort(spans["feature"], kind="stable")
    order = order[spans["feature"][order] >= 0]  # without the padding of the last batch
    return {key: value[order] for key, value in spans.items()}


def _best_of_rows(model, recipe, batch):
    logits = model({key: batch[key] for key in model.input}, training=False)
    begin, end, score = span_model.best_spans(
        logits["start_logits"],
        logits["end_logits"],
        batch["may_begin"],
        batch["may_end"],
        n_best=recipe.n_best,
        max_answer_length=recipe.max_answer_length,
    )
    offset = batch["offset"][:, tf.newaxis]
    return {
        "feature": batch["feature"],
        "begin": begin - offset,
        "end": end - offset,
        "score": score,
    }


def n_best_answers(features, spans: dict, n_best: int) -> dict[str, list[dict]]:
    """Returns the best answers to each question, best first.

    The spans of all windows of a question are compared. Of several spans with the same text, the
    one with the highest score is kept.

    Args:
        features: an `inputs.squad.examples.Features`.
        spans: from `predict_spans`.
        n_best: the largest number of answers to a question.

    Returns:
        A dictionary: question id -> list of {"text", "score", "probability"}. The score is the sum
        of the start and end logits; the probability is its softmax over the list. A question
        without a possible span has one answer, "".
    """
    answers = {}
    windows = zip(
        features.question_of[spans["feature"]],
        *(spans[key] for key in ("begin", "end", "score")),
        strict=True,
    )
    for question, group in itertools.groupby(windows, key=lambda window: int(window[0])):
        begins, ends, scores = (np.concatenate(c) for c in list(zip(*group, strict=True))[1:])
        best = {}  # text -> score
        for i in np.argsort(-scores, kind="stable"):
            if len(best) == n_best or scores[i] < 0.5 * span_model.IMPOSSIBLE:
                break
            text = features.text_of(question, int(begins[i]), int(ends[i]))
            best.setdefault(text, float(scores[i]))
        best = best or {"": 0.0}
        shares = np.exp(np.array(list(best.values())) - max(best.values()))
        answers[features.squad.questions[question].id] = [
            {"text": text, "score": score, "probability": float(share)}
            for (text, score), share in zip(best.items(), shares / shares.sum(), strict=True)
        ]
    return answers


def metrics(squad, answered: dict[str, str]) -> dict[str, float]:
    """Returns exact match and F1, in percent, over all questions, by the official script.

    Args:
        squad: an `inputs.squad.files.Squad`.
        answered: question id -> answer. A question without an answer scores 0.
    """
    found = squad_evaluate_v1_1.evaluate(squad.evaluated_as(), answered)
    return {"exact_match": 100 * found["exact_match"], "f1": 100 * found["final_f1"]}


def predictions(answers: dict[str, list[dict]]) -> dict[str, str]:
    """Returns question id -> best answer, from the result of `n_best_answers`."""
    return {key: best[0]["text"] for key, best in answers.items()}


def write_answers(model_dir: str, answers: dict[str, list[dict]]) -> None:
    """Writes predictions.json (id -> text, the official script's format) and nbest.json."""
    for name, content in (("nbest.json", answers), ("predictions.json", predictions(answers))):
        path = os.path.join(model_dir, name)
        with atomic_write(path) as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
