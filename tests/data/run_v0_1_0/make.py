"""Wrote the files in this folder with version 0.1.0 (commit 96e086f): a run that was interrupted.

    PYTHONPATH=CHECKOUT_OF_0.1.0 python tests/data/run_v0_1_0/make.py FOLDER

It ran on a CPU under TensorFlow 2.20.0 and tf_keras 2.20.1. Do not regenerate the files with a
later version: they show that the current one resumes a run of 0.1.0.

files.zip:

text.txt             the text, 40 documents
run/                 the model_dir after 4 of 8 steps, without its logs
finished/ckpt-8.*    the last checkpoint of the same run, not interrupted

The model is `SIZE`, so that the files are small. train.py got the arguments `ARGUMENTS`.
"""

import pathlib
import random
import shutil
import sys
import zipfile

SIZE = (1, 8, 2)  # layers, width, heads, under the name "tiny"
ARGUMENTS = (
    *("--recipe=bert-mini-demo", "--steps=8", "--steps_per_loop=2", "--global_batch_size=8"),
    *("--set=vocabulary_size=60", "--set=max_sequence_length=32", "--set=sequence_length=32"),
    *("--set=predictions=4", "--set=evaluation_examples=16", "--set=save_every_steps=4"),
    *("--set=keep_checkpoints=9", "--set=dropout=0.0"),
)


def write_text(path: pathlib.Path) -> None:
    """Writes 40 documents of 6 short sentences."""
    rng = random.Random(0)
    animals, places = ("cat", "dog", "bird", "fish"), ("mat", "log", "tree", "sea")
    with open(path, "w", encoding="utf-8") as file:
        for document in range(40):
            for _ in range(6):
                i = rng.randrange(4)
                file.write(f"The {animals[i]} number {document} sat on the {places[i]}.\n")
            file.write("\n")


def main(folder: pathlib.Path) -> None:
    """Writes files.zip, by way of a temporary model_dir in the folder."""
    from absl import flags

    import train
    from models import bert

    bert.SIZES["tiny"] = bert.Size(*SIZE)
    text, run = folder / "text.txt", folder / "run"
    write_text(text)
    flags.FLAGS(["train.py", f"--data_dir={text}", f"--model_dir={run}", *ARGUMENTS])
    assert train.main(["train.py"]) == 0
    finished = folder / "finished"
    finished.mkdir()
    for path in run.glob("ckpt-8.*"):
        path.rename(finished / path.name)
    (run / "checkpoint").write_text(
        'model_checkpoint_path: "ckpt-4"\nall_model_checkpoint_paths: "ckpt-4"\n'
    )
    for name in ("train", "eval", "telemetry", "best", "export"):
        shutil.rmtree(run / name, ignore_errors=True)
    with zipfile.ZipFile(folder / "files.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted([text, *run.rglob("*"), *finished.rglob("*")]):
            if path.is_file():
                archive.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
