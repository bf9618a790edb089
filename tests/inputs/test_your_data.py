"""The commands of docs/guides/your-data.md, run on small files of each kind."""

import bz2
import gzip
import importlib.util
import json
import os
import pathlib
import pickle
import random
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from pictures import class_folders, encoded, example, manifest, prepare, smooth
from tars import tar_of

from inputs.text import prepare as prepare_text
from inputs.text.tokenization.vocabulary import SPECIAL_TOKENS

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/guides/your-data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
# What `pip install` names, and what Python imports.
MODULES = {"wikiextractor": "wikiextractor", "datasets": "datasets", "pandas": "pandas"}
# Output folder -> number of documents, or of training and validation images.
EXPECTED = {
    "shards/own": 7,
    "shards/lines": 6,
    "shards/wikipedia": 5,
    "shards/table": 10,
    "shards/hub": 5,
    "shards/web": 5,
    "data/photos": (12, None),
    "data/animals": (6, 3),
    "data/birds": (3, None),
    "data/kaggle": (3, 2),
    "data/imagenet": (3, 2),
    "data/tfrecords": (3, 3),
    "data/tfds": (3, 3),
    "data/parquet": (4, None),
    "data/cifar10": (10, 2),
}
WNIDS = ("n01440764", "n01443537", "n01484850")
PICTURES = [encoded(smooth(16, 20, seed=i)) for i in range(3)]
RNG = random.Random(0)
DUMP = """\
<mediawiki><siteinfo><base>https://en.wikipedia.org/wiki/Main_Page</base><namespaces>
<namespace key="10" case="first-letter">Template</namespace>
</namespaces></siteinfo>
{pages}
</mediawiki>
"""
DUMP_PAGE = """\
  <page>
    <title>T{i}</title>
    <ns>0</ns>
    <id>{i}</id>
    <revision>
      <id>9{i}</id>
      <text xml:space="preserve">{text}</text>
    </revision>
  </page>
"""


def texts(count):
    """Different documents of one paragraph."""
    words = "cat dog sat mat the on a".split()
    return [" ".join(RNG.choices(words, k=20)) + "." for _ in range(count)]


def put(name, data):
    path = pathlib.Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def json_lines(documents):
    return "".join(json.dumps({"text": text}) + "\n" for text in documents)


def own_text():
    put("books/a.txt", "\n\n".join(texts(3)))
    put("books/deep/b.txt", "\n\n".join(texts(2)))
    put("news.jsonl.gz", gzip.compress(json_lines(texts(2)).encode()))
    put("lines.txt", "\n".join(texts(6)))


def wikipedia():
    if importlib.util.find_spec("wikiextractor"):
        pages = "".join(DUMP_PAGE.format(i=i, text=text) for i, text in enumerate(texts(5)))
        dump = bz2.compress(DUMP.format(pages=pages).encode())
        put("enwiki-latest-pages-articles.xml.bz2", dump)
        return
    page = '<doc id="{i}" url="https://x?curid={i}" title="T{i}">\nT{i}\n\n{text}\n\n</doc>\n'
    put("extracted/AA/wiki_00", "".join(page.format(i=i, text=t) for i, t in enumerate(texts(5))))


def tables():
    import pandas

    rows = [{"text": text, "id": i} for i, text in enumerate(texts(10))]
    pandas.DataFrame(rows[:4]).to_parquet("a.parquet")
    pandas.DataFrame(rows[4:]).to_csv("b.csv")
    pictures = [{"image": {"bytes": PICTURES[i % 3], "path": ""}, "label": i} for i in range(4)]
    pandas.DataFrame(pictures).to_parquet("pictures.parquet")


def hub():
    if importlib.util.find_spec("datasets"):
        import datasets

        datasets.Dataset.from_dict({"text": texts(5)}).save_to_disk("saved")


def web():
    record = "WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Length: {size}\r\n\r\n{text}\r\n\r\n"
    parts = [("warcinfo", "about"), *(("conversion", f"{text}\né") for text in texts(5))]
    records = [record.format(kind=k, size=len(t.encode()), text=t) for k, t in parts]
    put("CC-MAIN-00000.warc.wet.gz", b"".join(gzip.compress(r.encode()) for r in records))


def folders_of_pictures():
    class_folders(pathlib.Path("photos"))
    for split, count in (("train", 2), ("val", 1)):
        class_folders(pathlib.Path("animals", split), per_class=count)
    put("birds.tar", tar_of({f"./{i}.jpg": data for i, data in enumerate(PICTURES)}))
    put("birds.csv", "file,index\n0.jpg,0\n1.jpg,1\n2.jpg,1\n")
    put("classes.csv", "index,wnid,name\n0,a,A\n1,b,B\n")


def imagenet():
    validation = {f"ILSVRC2012_val_0000000{i}.JPEG": PICTURES[i] for i in (1, 2)}
    boxes = "".join(f"ILSVRC2012_val_0000000{i},{WNIDS[i]} 1 2 3 4 \n" for i in (1, 2))
    top = "imagenet-object-localization-challenge"
    put(f"{top}/LOC_val_solution.csv", f"ImageId,PredictionString\n{boxes}")
    put(f"{top}/LOC_synset_mapping.txt", "".join(f"{w} name, other\n" for w in WNIDS))
    for name, data in validation.items():
        put(f"{top}/ILSVRC/Data/CLS-LOC/val/{name}", data)
        put(f"{top}/ILSVRC/Data/CLS-LOC/test/{name}", data)
    inner = {}
    for wnid, data in zip(WNIDS, PICTURES, strict=True):
        put(f"{top}/ILSVRC/Data/CLS-LOC/train/{wnid}/{wnid}_1.JPEG", data)
        inner[f"{wnid}.tar"] = tar_of({f"{wnid}_1.JPEG": data})
    put("ILSVRC2012/ILSVRC2012_img_train.tar", tar_of(inner))
    put("ILSVRC2012/ILSVRC2012_img_val.tar", tar_of(validation))
    labels = "\n".join((WNIDS[1], WNIDS[2]))
    put("ILSVRC2012/imagenet_2012_validation_synset_labels.txt", labels)


def records():
    tfds = "tensorflow_datasets/imagenet2012/5.1.0"
    put(f"{tfds}/label.labels.txt", "\n".join(WNIDS))
    pathlib.Path("tfrecords").mkdir()
    for split in ("train", "validation"):
        demo = f"tfrecords/{split}-00000-of-00001"
        with (
            tf.io.TFRecordWriter(demo, "GZIP") as first,
            tf.io.TFRecordWriter(f"{tfds}/imagenet2012-{split}.tfrecord-00000-of-00001") as second,
        ):
            for i, data in enumerate(PICTURES):
                first.write(example(image__encoded=data, image__class__label=i + 1))
                second.write(example(image=data, label=i))


def cifar():
    batch = {b"data": np.zeros([2, 3072], np.uint8), b"labels": [0, 1]}
    names = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    files = {f"cifar-10-batches-py/{name}": pickle.dumps(batch) for name in names}
    put("cifar-10-python.tar.gz", gzip.compress(tar_of(files)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the page names."""
    path = tmp_path_factory.mktemp("data")
    before = os.getcwd()
    os.chdir(path)
    try:
        put("vocab.txt", "\n".join([*SPECIAL_TOKENS, *"cat dog sat mat the on a .".split()]))
        for make in (own_text, wikipedia, tables, hub, web, folders_of_pictures):
            make()
        for make in (imagenet, records, cifar):
            make()
    finally:
        os.chdir(before)
    return path


def run(block):
    """Runs a block: our commands in this process, which saves their imports, the rest in a shell.

    Skips the test if a package that the block installs is missing.
    """
    for package in re.findall(r"^pip install (\S+)$", block, re.MULTILINE):
        if importlib.util.find_spec(MODULES[package]) is None:
            pytest.skip(f"{package} is not installed")
    shell = re.sub(r"^(pip install .*|python -m inputs\..*)$", "", block, flags=re.MULTILINE)
    python = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    subprocess.run(["bash", "-euc", python + shell], check=True)
    for line in block.splitlines():
        words = shlex.split(line) if line.startswith("python -m inputs.") else [None] * 3
        if words[2] == "inputs.text.prepare":
            assert prepare_text.main([*words[3:], "--workers=1"]) == 0
        elif words[2] == "inputs.images.prepare":
            assert prepare(*words[3:]) == 0


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_commands_of_the_page(folder, monkeypatch, block):
    monkeypatch.chdir(folder)
    run(block)
    for output in re.findall(r"--output=(\S+)", block):
        expected = EXPECTED[output]
        if isinstance(expected, int):
            assert manifest(folder / output)["documents"] == expected
            continue
        for split, count in zip(("train", "validation"), expected, strict=True):
            path = folder / output / split
            assert (manifest(path)["count"] if path.exists() else None) == count


def test_every_output_has_an_expected_count():
    assert set(re.findall(r"--output=(\S+)", "".join(BLOCKS))) == EXPECTED.keys()


def test_the_page_lists_every_kind_of_file():
    from inputs.images.sources import SUFFIXES
    from inputs.storage.files import COMPRESSIONS
    from inputs.text import files

    named = (*COMPRESSIONS, *files.SUFFIXES, ".json", *SUFFIXES)
    assert [suffix for suffix in named if f"`{suffix}`" not in PAGE] == []
    assert files.GUIDE == "docs/guides/your-data.md" and (ROOT / files.GUIDE).exists()
