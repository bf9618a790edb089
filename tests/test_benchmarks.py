"""The benchmarks refuse bad arguments in one sentence, before they measure."""

import importlib
import json
import os
import pathlib
import re
import sys
from unittest import mock

import keras  # noqa: F401  with its backend TensorFlow, before `benchmarks.jax_update` is imported
import pytest

from inputs.errors import InputError
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS

SOURCES = {
    path.stem: path.read_text()
    for path in sorted((pathlib.Path(__file__).parents[1] / "benchmarks").glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
}
REQUIRED = {
    "image_inputs": ["--data_dir=nowhere"],
    "inputs": ["--text=nowhere.txt", "--vocab=nowhere.txt"],
    "serving": ["nowhere.json", "nowhere.txt"],
    "squad_inputs": ["nowhere.json", "nowhere.txt"],
}
NUMBERS = [
    (name, flag)
    for name, source in SOURCES.items()
    for flag in re.findall(r'add_argument\(\s*"--(\w+)",\s*type=(?:int|float)', source)
]
WITH_JSON = [name for name, source in SOURCES.items() if '"--json"' in source]
COMPILED = ("--topology=v3:2x2", "--recipe=bert-mini-demo")


def run(name, *arguments):
    """Runs a benchmark in this process, whose environment stays as it is."""
    with mock.patch.dict(os.environ):
        module = importlib.import_module(f"benchmarks.{name}")
        with mock.patch.object(sys, "argv", [name, *REQUIRED.get(name, []), *arguments]):
            module.main()


def test_the_numbers_of_all_benchmarks_are_found():
    assert len(NUMBERS) == sum(len(re.findall("type=(int|float)", s)) for s in SOURCES.values())
    assert {"engine", "host_memory", "image_inputs", "tpu_step"} <= {name for name, _ in NUMBERS}


@pytest.mark.parametrize(("name", "flag"), NUMBERS)
def test_a_negative_number_is_refused(name, flag, capsys):
    with pytest.raises((InputError, SystemExit)) as end:
        run(name, f"--{flag}=-1")
    assert f"--{flag}" in (str(end.value) if end.type is InputError else capsys.readouterr().err)


@pytest.mark.parametrize("name", WITH_JSON)
def test_a_result_that_cannot_be_written_is_refused(name, tmp_path):
    more = ["--text=a.txt", "--vocab=vocab.txt"] if name == "inputs" else []
    (tmp_path / "a.txt").write_text("A text.\n")
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "a"]))
    with pytest.raises(InputError, match=r"^--json=no/x\.json: there is no folder .*/no\."):
        run(name, *more, "--json=no/x.json")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("engine", ["--rounds=0", "--starts=0"], "leave nothing to time"),
        ("engine", ["--steps_per_loop=0"], "--steps_per_loop must be at least 1"),
        ("engine", ["--steps_per_loop=300"], "--steps_per_loop=300: give a divisor of 500"),
        ("engine", ["--steps_per_loop=500"], "at most 250"),
        ("host_memory", ["--folder=nowhere"], "--folder=nowhere is not a folder of this machine"),
        ("image_inputs", [], "--data_dir: nowhere/train"),
        ("image_inputs", ["--rounds=0"], "--rounds must be at least 1. Received: --rounds=0."),
        ("image_inputs", ["--seconds=0"], "--seconds must be positive and finite. Received"),
        ("image_inputs", ["--seconds=nan"], "--seconds=nan"),
        ("image_inputs", ["--seconds=inf"], "--seconds=inf"),
        ("inputs", [], "--text: .*nowhere.txt"),
        ("inputs", ["--rounds=0"], "--rounds must be at least 1"),
        ("jax_update", ["--rounds=0"], "--rounds must be at least 1"),
        ("lowering", ["--replicas=0"], "--replicas must be at least 1"),
        ("optimizers", ["--rounds=0"], "--rounds must be at least 1"),
        ("optimizers", ["--only=zzz"], "--only=zzz .* The names are tf_lamb, Keras 3; tf_lamb"),
        ("optimizers", ["--rule=lars", "--only=Lamb"], "; tf-models LARS"),
        ("packing", ["--rounds=0"], "--rounds must be at least 1"),
        ("packing", ["--length=1"], "--length must be at least 2"),
        ("packing", ["--sequences=0"], "--sequences must be at least 1"),
        ("packing", ["--per_row=3"], "--per_row has no effect without --topology"),
        ("packing", ["--rounds=3", *COMPILED], "--rounds has no effect with --topology"),
        ("packing", ["--per_row=0", *COMPILED], "--per_row must be at least 1"),
        ("packing", ["--length_buckets=x", *COMPILED], "or --length_buckets: .*length_buckets"),
        ("packing", ["--length_buckets=-1", *COMPILED], "or --length_buckets: .* at least 5 tok"),
        ("serving", [], "VOCAB: nowhere.txt"),
        ("serving", ["--repeats=0"], "--repeats must be at least 1"),
        ("shuffling", ["--examples=0"], "--examples must be at least 1"),
        ("shuffling", ["--examples=10", "--batches=1,64"], "Give at least 128 examples, or"),
        ("shuffling", ["--batches=0"], "--batches must be at least 1"),
        ("shuffling", ["--batches=64,-64"], "--batches must be at least 1"),
        ("shuffling", ["--batches=x"], "--batches=x: give batch sizes separated by commas"),
        ("shuffling", ["--block=0"], "--block must be at least 1"),
        ("shuffling", ["--window=0"], "--window must be at least 1"),
        ("squad_inputs", [], "VOCAB: nowhere.txt"),
        ("squad_inputs", ["--batches=0"], "--batches must be at least 1"),
        ("squad_inputs", ["--max_bad_record_share=2"], "--max_bad_record_share=2: give a share"),
        ("tpu_step", ["--set=beta_2=2"], "--recipe or --set: `beta_2` must"),
        ("tpu_step", ["--set=length_buckets=1"], "--recipe or --set: .* at least 5 tokens"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(name, arguments, said):
    with pytest.raises(InputError, match=said):
        run(name, *arguments)


def test_the_squad_file_is_named_as_its_argument(tmp_path, monkeypatch):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "a"]))
    question = {"id": "1", "question": "Who?", "answers": [{"answer_start": 0, "text": "Ada"}]}
    paragraph = {"context": "Ada wrote it.", "qas": [question]}
    (tmp_path / "one.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    (tmp_path / "none.json").write_text(json.dumps({"data": []}))
    (tmp_path / "field.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    for name in ("serving", "squad_inputs"):
        for file in ("none", "field", "broken", "nowhere"):
            monkeypatch.setitem(REQUIRED, name, [f"{file}.json", "vocab.txt"])
            with pytest.raises(InputError, match=f"^SQUAD: .*{file}.json"):
                run(name)
    monkeypatch.setitem(REQUIRED, "serving", ["one.json", "vocab.txt"])
    with pytest.raises(InputError, match=r"^SQUAD: one.json has 1 .* --repeats=15 needs 192 diff"):
        run("serving")


def test_a_word_in_no_name_of_a_model_is_refused(monkeypatch):
    from benchmarks import model_zoo

    monkeypatch.setattr(model_zoo, "libraries", lambda: {"a.b": lambda: {"C": pytest.fail}})
    with pytest.raises(InputError, match="'zzz' is in the name of no model.* a.b"):
        run("exclusions", "zzz")


def test_a_command_that_is_timed_says_why_it_failed():
    from benchmarks import inputs

    with pytest.raises(InputError, match="failed: no space$"):
        inputs.cpu_seconds([sys.executable, "-c", "import sys; sys.exit('first\\nno space')"])
    with pytest.raises(InputError, match="failed: exit status 3$"):
        inputs.cpu_seconds([sys.executable, "-c", "import sys; sys.exit(3)"])
