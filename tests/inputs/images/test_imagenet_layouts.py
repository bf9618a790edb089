"""ImageNet as Kaggle, image-net.org, the TPU demos and TensorFlow Datasets distribute it."""

import gzip
import pathlib
import tarfile

import pytest
import tensorflow as tf
from pictures import encoded, example, manifest, prepare, smooth, stored
from tars import tar_of

WNIDS = ("n01440764", "n01443537", "n01484850")
MAPPING = "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn01484850 great white shark\n"
PICTURES = [encoded(smooth(16, 20, seed=i)) for i in range(6)]
CLASSES = "index,wnid,name\n0,a,A\n1,b,B\n2,c,C\n"
OUT = pathlib.Path("out")


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def run(source, *flags):
    assert prepare("--source", source, "--output", "out", *flags) == 0


def name_of(index):
    return f"ILSVRC2012_val_{index + 1:08d}"


def solution(labels):
    """Kaggle's LOC_val_solution.csv, in no order, with several boxes for an image."""
    boxes = "{w} 85 1 499 272 {w} 1 2 3 4 "
    lines = [f"{name_of(i)},{boxes.format(w=WNIDS[label])}" for i, label in enumerate(labels)]
    return "\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n"


@pytest.fixture
def kaggle(tmp_path):
    """The folder that Kaggle's archive unpacks to, with six pictures."""
    top = tmp_path / "kaggle"
    data = top / "ILSVRC/Data/CLS-LOC"
    for label, wnid in enumerate(WNIDS):
        put(data / f"train/{wnid}/{wnid}_10026.JPEG", PICTURES[label])
    for i in range(3):
        put(data / f"val/{name_of(i)}.JPEG", PICTURES[3 + i])
        put(data / f"test/ILSVRC2012_test_0000000{i}.JPEG", PICTURES[i])
    put(top / "ILSVRC/Annotations/CLS-LOC/val/a.xml", "x")
    put(top / "LOC_val_solution.csv", solution([2, 0, 1]))
    put(top / "LOC_synset_mapping.txt", MAPPING)
    return top


@pytest.mark.parametrize("below", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_kaggle(kaggle, below, capsys):
    run(kaggle / below)
    assert stored(OUT / "train") == [(PICTURES[i], i) for i in range(3)]
    labelled = [(PICTURES[3], 2), (PICTURES[4], 0), (PICTURES[5], 1)]
    assert stored(OUT / "validation") == labelled
    assert manifest(OUT / "train")["classes"][0] == ["n01440764", "tench, Tinca tinca"]
    assert "CLS-LOC/test is passed over" in capsys.readouterr().err


def test_kaggle_without_the_list_of_classes(kaggle):
    (kaggle / "LOC_synset_mapping.txt").unlink()
    run(kaggle)
    assert [label for _, label in stored(OUT / "validation")] == [2, 0, 1]
    assert [wnid for wnid, _ in manifest(OUT / "validation")["classes"]] == [*WNIDS]


def test_other_pictures_beside_the_list_of_classes(kaggle):
    """Only ImageNet's own folders take their classes from it."""
    for name in ("cat", "dog"):
        put(kaggle / f"mine/{name}/1.jpg", PICTURES[0])
    run(kaggle / "mine")
    assert [wnid for wnid, _ in manifest(OUT / "train")["classes"]] == ["cat", "dog"]


def test_the_validation_folder_by_itself(kaggle):
    run(kaggle / "ILSVRC/Data/CLS-LOC/val")
    assert [label for _, label in stored(OUT / "validation")] == [2, 0, 1]


def test_kaggle_without_the_solution(kaggle, capsys):
    (kaggle / "LOC_val_solution.csv").unlink()
    assert prepare("--source", kaggle, "--output", "out") == 1
    assert "CLS-LOC/val has no class folders, so the labels" in capsys.readouterr().err
    val = kaggle / "ILSVRC/Data/CLS-LOC/val"
    assert prepare("--source", val, "--output", "out") == 1
    assert "for ImageNet, put LOC_val_solution.csv or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "said"),
    [([2, 0], "00000003.JPEG: its label is not known"), ([2, 0, 1], "n01484850")],
)
def test_a_validation_image_without_a_class(kaggle, capsys, labels, said):
    put(kaggle / "LOC_val_solution.csv", solution(labels))
    if len(labels) == 3:  # the class is missing in the list
        put(kaggle / "LOC_synset_mapping.txt", MAPPING.replace("n01484850", "n00000000"))
    assert prepare("--source", kaggle / "ILSVRC/Data/CLS-LOC/val", "--output", "out") == 1
    assert said in capsys.readouterr().err


@pytest.fixture
def official(tmp_path):
    """The two tars of image-net.org."""
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": PICTURES[label] for i in range(2)})
        for label, wnid in reversed([*enumerate(WNIDS)])
    }
    put(tmp_path / "tars/ILSVRC2012_img_train.tar", tar_of(inner))
    flat = {f"{name_of(i)}.JPEG": PICTURES[3 + i] for i in range(3)}
    put(tmp_path / "tars/ILSVRC2012_img_val.tar", tar_of(flat))
    put(
        tmp_path / "tars/imagenet_2012_validation_synset_labels.txt",
        "".join(f"{WNIDS[i]}\n" for i in (2, 0, 1)),
    )
    return tmp_path / "tars"


@pytest.mark.parametrize("names", ["list of labels", "with Kaggle's files"])
def test_the_official_tars(official, names):
    if "Kaggle" in names:
        (official / "imagenet_2012_validation_synset_labels.txt").unlink()
        put(official / "LOC_val_solution.csv", solution([2, 0, 1]))
        put(official / "LOC_synset_mapping.txt", MAPPING)
    run(official)
    assert stored(OUT / "train") == [(PICTURES[i // 2], i // 2) for i in range(6)]
    labelled = [(PICTURES[3], 2), (PICTURES[4], 0), (PICTURES[5], 1)]
    assert stored(OUT / "validation") == labelled
    name = "tench, Tinca tinca" if "Kaggle" in names else "n01440764"
    assert manifest(OUT / "train")["classes"][0] == ["n01440764", name]


def test_other_members_are_passed_over(official, capsys):
    """A README, and what macOS adds."""
    train = official / "ILSVRC2012_img_train.tar"
    with tarfile.open(train) as archive:
        inner = {member.name: archive.extractfile(member).read() for member in archive}
    put(train, tar_of({"._n01440764.tar": b"\0", "README": b"x", **inner}))
    run(train)
    assert "2 passed over: 1 × hidden, 1 × without a suffix" in capsys.readouterr().err
    assert manifest(OUT / "train")["class_counts"] == [2, 2, 2]


def test_a_tar_of_class_folders_is_not_taken_for_validation(official, capsys):
    files = {f"train/{wnid}/1.JPEG": PICTURES[0] for wnid in WNIDS}
    put(official / "ILSVRC2012_img_train.tar", tar_of(files))
    assert prepare("--source", official, "--output", "out") == 1
    said = capsys.readouterr().err
    assert "train.tar are not known" in said and "If the tar has class folders, unpack it" in said


@pytest.mark.parametrize("place", ["outer", "inner"])
def test_a_tar_that_is_cut_between_two_members_is_refused(official, capsys, place):
    train = official / "ILSVRC2012_img_train.tar"
    if place == "outer":
        whole = train.read_bytes()
        put(train, whole[: whole.index(b"n01440764.tar")])  # the last one
    else:
        inner = tar_of({f"{i}.JPEG": PICTURES[i] for i in range(2)})
        put(train, tar_of({"n01440764.tar": inner[: inner.index(b"1.JPEG")]}))
    assert prepare("--source", train, "--output", "out") == 1
    assert "it is cut or damaged at byte" in capsys.readouterr().err


def test_one_official_tar(official):
    run(official / "ILSVRC2012_img_val.tar")
    assert [label for _, label in stored(OUT / "validation")] == [2, 0, 1]
    run(official / "ILSVRC2012_img_train.tar")
    assert manifest(OUT / "train")["class_counts"] == [2, 2, 2]


def test_an_official_tar_without_labels_or_cut_off(official, capsys):
    (official / "imagenet_2012_validation_synset_labels.txt").unlink()
    validation, train = (official / f"ILSVRC2012_img_{s}.tar" for s in ("val", "train"))
    assert prepare("--source", validation, "--output", "out") == 1
    assert "the labels of" in capsys.readouterr().err
    train.write_bytes(train.read_bytes()[:-20_000])
    assert prepare("--source", train, "--output", "out") == 1
    assert "cannot be read as a tar" in capsys.readouterr().err


def test_members_with_a_dot_and_links(tmp_path, capsys):
    """`tar cf a.tar .` writes ./1.jpg; GNU tar stores the second name of a file as a hard link."""
    put(tmp_path / "classes.csv", "index,wnid,name\n0,a,A\n1,b,B\n")
    links = {
        "./2.jpg": (tarfile.LNKTYPE, "./1.jpg"),
        "./deep/3.jpg": (tarfile.SYMTYPE, "../2.jpg"),
        "./4.jpg": (tarfile.SYMTYPE, "nowhere.jpg"),
    }
    put(tmp_path / "a.tar", tar_of({"./1.jpg": PICTURES[0]}, **links))
    put(tmp_path / "a.csv", "file,index\n1.jpg,0\n./2.jpg,1\ndeep/3.jpg,1\n")
    assert prepare("--source", tmp_path / "a.tar", "--output", "out") == 1
    assert (
        "a.tar:4.jpg is a link to nowhere.jpg, which is not in the tar" in capsys.readouterr().err
    )
    links.pop("./4.jpg")
    put(tmp_path / "a.tar", tar_of({"./1.jpg": PICTURES[0]}, **links))
    run(tmp_path / "a.tar")
    assert stored(OUT / "train") == [(PICTURES[0], label) for label in (0, 1, 1)]


def test_members_that_the_table_does_not_list_are_passed_over(tmp_path, capsys):
    put(tmp_path / "classes.csv", CLASSES)
    put(tmp_path / "a.tar", tar_of({f"{name}.jpg": PICTURES[0] for name in ("1", "2", "._1")}))
    put(tmp_path / "a.csv", "file,index\n1.jpg,0\n")
    run(tmp_path / "a.tar")
    assert "2 passed over: 1 × hidden, 1 × .jpg" in capsys.readouterr().err
    put(tmp_path / "a.csv", "file,index\n1.jpg,0\n./1.jpg,1\n")
    assert prepare("--source", tmp_path / "a.tar", "--output", "out") == 1
    assert "line 3, file: './1.jpg' has the label 1 here, but 0 in" in capsys.readouterr().err


def test_a_compressed_tar_is_refused(tmp_path, capsys):
    put(tmp_path / "a.tar", gzip.compress(tar_of({"1.jpg": PICTURES[0]})))
    assert prepare("--source", tmp_path / "a.tar", "--output", "out") == 1
    assert "Decompress it" in capsys.readouterr().err


def write_records(folder, files, ending="", compression=""):
    """Files of (split, [records])."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, records in files:
        path = folder / f"imagenet2012-{split}.tfrecord-00000-of-00001{ending}"
        with tf.io.TFRecordWriter(str(path), compression) as writer:
            for record in records:
                writer.write(record)
    return folder


@pytest.mark.parametrize(
    ("ending", "compression"), [(".gz", "GZIP"), ("", "GZIP"), ("", "ZLIB"), (".gz", "")]
)
def test_compressed_tfrecords(tmp_path, ending, compression):
    """Whatever the name says."""
    records = [example(image=PICTURES[i], label=i) for i in range(3)]
    source = write_records(tmp_path / "source", [("train", records)], ending, compression)
    run(source)
    assert stored(OUT / "train") == [(PICTURES[i], i) for i in range(3)]


def test_two_copies_of_a_split_are_refused(tmp_path, capsys):
    source = write_records(tmp_path / "source", [("train", [example(image=PICTURES[0], label=0)])])
    write_records(source, [("train", [])], ".gz")
    assert prepare("--source", source, "--output", "out") == 1
    assert "two copies of the train split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "train", "validation", "base", "said"),
    [
        # Each class is in one of the splits, at least.
        ("", (2, 1, 3), (1, 2, 3), 1, "count from 1: no record has the label 0"),
        ("", (2, 1, 0), (1, 2, 0), 0, ""),
        ("CSV", (2, 1), (1, 0), 0, ""),
        ("CSV", (2, 1), (3,), 1, "has 3, of 3 classes"),
        ("label.labels.txt", (2, 1), (3,), 1, "has 3, of 3 classes"),
        ("label.labels.txt", (2, 1), (2, 1), 0, ""),  # neither 0 nor 3: the rule of the layout
        ("label.labels.txt", (0,), (2,), 0, ""),
    ],
)
def test_the_label_base_of_tfds_is_found_out(
    tmp_path, capsys, classes, train, validation, base, said
):
    files = [
        (split, [example(image=PICTURES[label], label=label) for label in labels])
        for split, labels in (("train", train), ("validation", validation))
    ]
    source = write_records(tmp_path / "source", files)
    put(tmp_path / "classes.csv", CLASSES)
    if classes == "label.labels.txt":
        put(source / classes, "a\nb\nc\n")
    run(source, *(("--classes", tmp_path / "classes.csv") if classes == "CSV" else ()))
    assert [label for _, label in stored(OUT / "train")] == [label - base for label in train]
    shown = capsys.readouterr().err
    assert said in shown and ("Labels count from 1" in shown) == bool(base)


def test_the_flag_overrides_what_is_found_out(tmp_path):
    files = [("train", [example(image=PICTURES[i], label=i) for i in (1, 2)])]
    put(tmp_path / "classes.csv", CLASSES)
    source = write_records(tmp_path / "source", files)
    run(source, "--label_base", 0, "--classes", tmp_path / "classes.csv")
    assert manifest(OUT / "train")["class_counts"] == [0, 1, 1]
