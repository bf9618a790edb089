"""Wrote the files in this folder with version 0.1.0 (commit 96e086f): a SavedModel of BERT.

    PYTHONPATH=CHECKOUT_OF_0.1.0 python tests/data/export_v0_1_0/make.py FOLDER

It ran on a CPU under TensorFlow 2.20.0 and tf_keras 2.20.1. Do not regenerate the files with a
later version: they show that the current client calls a SavedModel of 0.1.0.

files.zip has the folder `export` of the run of tests/data/run_v0_1_0/make.py, and `answer.txt`:
what `python -m training.fill_mask export SENTENCE` printed then, for `SENTENCE`.
"""

import importlib.util
import pathlib
import subprocess
import sys
import zipfile

SENTENCE = "The cat sat on the [MASK]."


def main(folder: pathlib.Path) -> None:
    """Writes files.zip, by way of a temporary model_dir in the folder."""
    path = pathlib.Path(__file__).parents[1] / "run_v0_1_0/make.py"
    spec = importlib.util.spec_from_file_location("make_run", path)
    make_run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_run)
    from absl import flags

    import train
    from models import bert

    bert.SIZES["tiny"] = bert.Size(*make_run.SIZE)
    text, run = folder / "text.txt", folder / "run"
    make_run.write_text(text)
    flags.FLAGS(["train.py", f"--data_dir={text}", f"--model_dir={run}", *make_run.ARGUMENTS])
    assert train.main(["train.py"]) == 0
    export = run / "export"
    command = [sys.executable, "-m", "training.fill_mask", str(export), SENTENCE]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (folder / "answer.txt").write_text(answer)
    with zipfile.ZipFile(folder / "files.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "answer.txt", "answer.txt")
        for path in sorted(export.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(run))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
