"""Image batches: order, crops, formats, and determinism of each example."""

import io
import json
import pathlib

import numpy as np
import PIL.Image
import pytest
import tensorflow as tf
from pictures import damage, encoded, example, manifest, prepare, prepared, smooth, stored
from read_only import read_only

from inputs.bad_records import BadRecords
from inputs.errors import InputError, message_in
from inputs.images import decoding, examples, index
from inputs.shards import read_records

SIZE, BATCH, COUNT = 32, 4, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 JPEGs of 3 classes."""
    return prepared(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """CIFAR-10 of 5 x 2 training images."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("strips", "pixels"))
    rng = np.random.default_rng(0)
    for name in (*(f"train-{i}" for i in range(5)), "test"):
        strip = rng.integers(0, 256, [64, 32, 3], dtype=np.uint8)
        (source / f"{name}.png").write_bytes(encoded(strip, "PNG"))
    np.savez(source / "labels.npz", y_train=np.arange(10), y_test=np.arange(2))
    assert prepare("--source", source, "--output", out) == 0
    return out


def make(folder, split="train", **arguments):
    return examples.Images(str(folder / split), SIZE, **{"seed": 1} | arguments)


def joined(batches):
    batches = list(batches)
    return {key: np.concatenate([b[key].numpy() for b in batches]) for key in batches[0]}


def context(host, hosts, replicas):
    return tf.distribute.InputContext(hosts, host, replicas)


@pytest.mark.parametrize("kind", ["folder", "pixels"])
def test_an_epoch_has_every_image_once_in_a_new_order(request, kind):
    data = make(request.getfixturevalue(kind), augmentation="none")
    size = data.num_examples // 2
    epochs = [joined(data.training_batches(size, first_step=2 * e).take(2)) for e in range(3)]
    images = [epoch["image"].reshape(data.num_examples, -1) for epoch in epochs]
    sums = [image.sum(1, dtype=np.int64) for image in images]
    assert len(set(sums[0])) == data.num_examples  # the sum identifies an image
    assert all(sorted(sums[0]) == sorted(other) for other in sums)
    assert not np.array_equal(sums[0], sums[1]) and not np.array_equal(sums[1], sums[2])
    assert epochs[0]["image"].dtype == np.uint8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "pixels"])
def test_an_example_depends_only_on_seed_and_id(request, kind):
    """Not on the number of replicas and hosts, and not on the first step."""
    data = make(request.getfixturevalue(kind))
    whole = joined(data.training_batches(BATCH).take(4))
    later = joined(data.training_batches(BATCH, first_step=2).take(2))
    for key, value in later.items():
        np.testing.assert_array_equal(value, whole[key][2 * BATCH :], key)
    one_host = joined(data.training_batches(BATCH, context(0, 1, 2)).take(8))
    np.testing.assert_array_equal(one_host["image"], whole["image"])
    hosts = [joined(data.training_batches(BATCH, context(h, 2, 2)).take(4)) for h in (0, 1)]
    halves = [host["image"].reshape(4, BATCH // 2, SIZE, SIZE, 3) for host in hosts]
    np.testing.assert_array_equal(
        np.concatenate(halves, 1).reshape(whole["image"].shape), whole["image"]
    )
    other = make(request.getfixturevalue(kind), seed=2).training_batches(BATCH).take(4)
    assert not np.array_equal(joined(other)["image"], whole["image"])


def test_batches_have_the_element_spec(folder, pixels):
    for data in (make(folder), make(pixels)):
        for batches in (data.training_batches(BATCH), data.evaluation_batches(BATCH, 100)):
            assert batches.element_spec == examples.element_spec(BATCH, SIZE)


def test_a_part_of_the_images_is_evenly_spaced(folder):
    """They lie in the order of their classes, so that the first ones would be of few classes."""
    data = make(folder, "validation")
    whole = joined(data.evaluation_batches(4, 100))
    chosen = [i * COUNT // 7 for i in range(7)]
    for lanes in (1, 4):  # which are interleaved
        found = joined(make(folder, "validation", lanes=lanes).evaluation_batches(4, 7))
        counted = found["example_weights"] > 0
        images = found["image"][counted], whole["image"][chosen]
        ours, exact = (sorted(map(bytes, some)) for some in images)
        assert ours == exact
        assert sorted(found["label"][counted]) == sorted(whole["label"][chosen])
    assert [label for _, label in data.files(7)] == [i // 4 for i in chosen]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "pixels"])
@pytest.mark.parametrize(("batch", "limit"), [(5, 100), (4, 100), (6, 7)])
def test_evaluation_counts_each_image_once(request, kind, batch, limit):
    """The last batch is filled with weight 0; two hosts see the same examples as one."""
    data = make(request.getfixturevalue(kind), "validation")
    total = min(limit, data.num_examples)
    found = joined(data.evaluation_batches(batch, limit))
    assert len(found["image"]) == -(-total // batch) * batch
    assert found["example_weights"].tolist() == [1.0] * total + [0.0] * (
        len(found["image"]) - total
    )
    again = joined(data.evaluation_batches(batch, limit))
    np.testing.assert_array_equal(found["image"], again["image"])
    if batch % 2 == 0:
        hosts = [joined(data.evaluation_batches(batch, limit, context(h, 2, 2))) for h in (0, 1)]
        assert sum(host["example_weights"].sum() for host in hosts) == total


def test_crops_have_the_published_shapes():
    """Area 8 to 100 %, aspect ratio 3/4 to 4/3, uniform; all inside the image."""
    count = 4000
    number = tf.range(count, dtype=tf.int64)
    height, width = tf.fill([count], np.int64(375)), tf.fill([count], np.int64(500))
    draws = decoding.window_draws(seed=3, ids=number)
    windows = decoding.random_windows(height, width, draws).numpy()
    top, left, h, w = windows.T
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= 375).all() and (left + w <= 500).all()
    area, aspect = h * w / (375 * 500), w / h
    assert area.min() > 0.08 - 0.005 and area.max() <= 1.0
    assert 0.74 < aspect.min() < 0.77 and 1.30 < aspect.max() < 1.35
    small = area < 0.5  # where nearly every crop fits
    np.testing.assert_allclose(
        np.histogram(area[small], 4, (0.08, 0.5))[0], small.sum() / 4, rtol=0.15
    )
    assert abs((top / np.maximum(375 - h, 1))[h < 300].mean() - 0.5) < 0.02
    thin = decoding.random_windows(
        tf.constant([10], tf.int64), tf.constant([4000], tf.int64), draws[:1]
    )
    assert thin.numpy().tolist() == [[0, (4000 - 13) // 2, 10, 13]]  # no crop fits


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_a_crop_is_the_same_part_of_the_whole_image(ratio):
    """A crop decoded alone, at a lower resolution if it is large, equals that of the image."""
    picture = smooth(100 * ratio, 120 * ratio, seed=5)
    data = encoded(picture)
    window = np.array([20, 30, 64, 72]) * ratio
    found = decoding.decode_window(data, tf.constant(window, tf.int32), 64).numpy()
    part = picture[window[0] : window[0] + window[2], window[1] : window[1] + window[3]]
    exact = np.asarray(PIL.Image.fromarray(part).resize((64, 64), PIL.Image.Resampling.BOX))
    assert np.abs(found.astype(int) - exact).mean() < 3
    shifted = np.roll(exact, 6, axis=0)
    assert np.abs(found.astype(int) - shifted).mean() > 6  # a shift would exceed the bound


FORMATS = [
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("PNG", "RGB"),
    ("PNG", "RGBA"),
    ("PNG", "P"),
    ("PNG", "L"),
    ("BMP", "RGB"),
]


@pytest.mark.parametrize(("kind", "mode"), FORMATS)
def test_every_format_decodes_to_its_colours(kind, mode):
    """Compared with Pillow: a crop as in training, and the center as in evaluation."""
    data = encoded(smooth(96, 96, seed=7), kind, mode)
    exact = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    whole = tf.constant([0, 0, 96, 96])
    crop = decoding.decode_window(data, whole, 96).numpy()
    centre = decoding.decode_centre(data, 96, 1.0).numpy()
    for found in (crop, centre):
        assert np.abs(found - exact).mean() < 2, (kind, mode)


@pytest.mark.parametrize("size", [224, 112])
def test_the_centre_equals_scaling_to_256_and_cropping_224(size):
    """At every size, the same part of the image."""
    picture = smooth(300, 500, seed=2)
    share = examples.CENTRE_SHARE
    found = decoding.decode_centre(encoded(picture, "PNG"), size, share).numpy()
    scaled = PIL.Image.fromarray(picture).resize((round(500 * 256 / 300), 256))
    left = (scaled.width - 224) // 2
    exact = scaled.crop((left, 16, left + 224, 240)).resize((size, size))
    assert np.abs(found - np.asarray(exact).astype(int)).mean() < 1


def test_flips_and_shifts_of_small_images(pixels):
    """Each image is one of the 9 x 9 shifts of the original, flipped or not."""
    data = make(pixels)
    plain = joined(make(pixels, augmentation="none").training_batches(10).take(1))["image"]
    moved = joined(data.training_batches(10).take(1))["image"]
    kinds = set()
    for before, after in zip(plain, moved, strict=True):
        found = [
            (flip, top, left)
            for flip in (False, True)
            for top in range(9)
            for left in range(9)
            if np.array_equal(
                np.pad(before[:, ::-1] if flip else before, [(4, 4), (4, 4), (0, 0)])[
                    top : top + SIZE, left : left + SIZE
                ],
                after,
            )
        ]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) > 5 and {kind[0] for kind in kinds} == {False, True}


def test_randaugment_is_a_function_of_seed_and_example():
    """It changes most images, differently for each example id, and always the same way."""
    augment = tf.function(decoding.rand_augment, reduce_retracing=True)
    picture = smooth(SIZE, SIZE)
    found = [
        augment(tf.constant(picture), seed=1, example_id=tf.constant(i, tf.int64)).numpy()
        for i in (*range(20), *range(20))
    ]
    for first, again in zip(found[:20], found[20:], strict=True):
        np.testing.assert_array_equal(first, again)
    assert sum(not np.array_equal(image, picture) for image in found[:20]) > 15
    assert len({image.tobytes() for image in found}) > 12


def test_randaugment_keeps_labels_and_order(pixels, monkeypatch):
    """A single operation takes the place of the fifteen, which take long to trace."""
    monkeypatch.setattr(decoding, "_augmentations", lambda image, level, sign: [lambda: 1 + image])
    plain, augmented = (
        joined(make(pixels, augmentation=kind).training_batches(10).take(1))
        for kind in ("crop", "randaugment")
    )
    np.testing.assert_array_equal(plain["label"], augmented["label"])
    np.testing.assert_array_equal(plain["image"] + decoding.LAYERS, augmented["image"])


@pytest.mark.slow
def test_mixing_weights_are_those_of_a_beta_distribution(pixels):
    data = make(pixels, mixup_alpha=0.2)
    weights = joined(data.training_batches(2000).take(1))["mixup"]
    assert weights.min() >= 0 and weights.max() <= 1
    assert abs(weights.mean() - 0.5) < 0.04
    assert abs(weights.var() - 1 / (4 * (2 * 0.2 + 1))) < 0.02  # of Beta(a, a)
    held_out = joined(data.evaluation_batches(4, 100))["mixup"]
    assert (held_out == 1).all()


def test_the_label_that_mixup_gives_to_another_image_belongs_to_the_image(folder, tmp_path):
    """A damaged image is replaced by another one of the batch, with its label."""
    data = make(folder, mixup_alpha=0.2, augmentation="none")
    whole = next(iter(data.training_batches(COUNT)))
    batch = {
        "id": tf.range(4, dtype=tf.int64),
        "image": whole["image"][:4],
        "label": tf.constant([5, 0, 7, 8]),
        "example_weights": tf.constant([1.0, 0.0, 1.0, 1.0]),
        "readable": tf.constant([True, False, True, True]),
    }
    finished = data._finished(True, batch)
    assert finished["label"].numpy().tolist() == [5, 5, 7, 8]
    np.testing.assert_array_equal(finished["image"][1], finished["image"][0])
    assert finished["example_weights"].numpy().tolist() == [1, 0, 1, 1]


def test_raw_pixels_of_another_size_are_refused(pixels):
    with pytest.raises(InputError, match=r"image_size=64: .* holds images of 32x32x3 raw pixels"):
        examples.Images(str(pixels / "train"), 64, seed=1)


@pytest.mark.parametrize("content", ["", "{", '{"kind": "text", "shards": [], "count": 0}', "[]"])
def test_a_folder_that_is_not_prepared_is_refused(tmp_path, content):
    if content:
        (pathlib.Path(tmp_path) / "manifest.json").write_text(content)
    with pytest.raises(
        InputError, match="cannot be read as JSON|not a manifest of shards|'images' is needed"
    ):
        examples.Images(str(tmp_path), 32, seed=1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("shards", (None, [1], [{"file": "a", "count": 1, "bytes": "1"}])),
        ("classes", (None, [], [["a"]], 5, [["a", 1]])),
        ("pixels", (5, [32, 32])),
        ("hash", (7,)),
        ("layout", (3, {"image": "image"}, {"image": 1, "label": "label", "label_base": 0})),
        ("classes", ([["\udce9", "\udce9"]],)),
    ],
)
def test_a_manifest_that_was_changed_is_refused(folder, tmp_path, field, values):
    whole = manifest(folder / "train")
    without = {key: value for key, value in whole.items() if key != field}
    for changed in (*({**whole, field: value} for value in values), without):
        if field == "layout" and changed is without:
            continue
        (tmp_path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match="^--data_dir: .*manifest.json") as caught:
            examples.Images(str(tmp_path), SIZE, seed=1)
        assert (
            field in str(caught.value)
            or "is not a manifest" in str(caught.value)
            or ("is not UTF-8" in str(caught.value))
        )


@pytest.mark.slow
def test_a_damaged_record_is_named_once_and_has_weight_0(tmp_path):
    out, said = prepared(tmp_path) / "train", []
    whole = joined(examples.Images(str(out), SIZE, seed=1).evaluation_batches(5, 100))
    shard, offset = damage(out, 7)
    records = BadRecords(0.1, skip=True, log=said.append)
    data = examples.Images(str(out), SIZE, seed=1, bad_records=records)
    for _ in range(2):
        found = joined(data.evaluation_batches(5, 100))
    assert found["example_weights"].tolist() == [1] * 7 + [0] + [1] * 4 + [0] * 3
    counted = found["example_weights"] > 0
    for key, values in found.items():
        np.testing.assert_array_equal(values[counted], whole[key][counted])
    # Batch statistics see another image of the batch in its place.
    np.testing.assert_array_equal(found["image"][7], found["image"][5])
    epoch = joined(data.training_batches(4).take(3))
    assert sorted(epoch["example_weights"]) == [0] + [1] * 11
    data.damage.collect()
    assert said == [f"Skipped: {shard}, byte {offset}: damaged or missing."]
    assert len(list(data.files(12))) == 11
    damage(out, 2)
    joined(data.evaluation_batches(5, 100))
    with pytest.raises(InputError, match="2 of 12 records are damaged, more than the share"):
        data.damage.collect()


@pytest.mark.slow
def test_every_kind_of_damage_costs_its_image_only(tmp_path):
    """Images that cannot be decoded, labels of no class, and a group of nothing else."""
    good = [(encoded(smooth(60, 80, seed=i)), 1 + i % 3) for i in range(50)]
    bad = dict(enumerate(good))
    bad[3] = (good[3][0][:200], 1)  # ends after its header
    bad[5] = (b"no image", 1)
    bad[7] = (good[7][0], 100)
    bad |= {i: (good[i][0], 0) for i in range(16, 32)}
    (tmp_path / "classes.csv").write_text("index,wnid,name\n0,n0,a\n1,n1,b\n2,n2,c\n")
    sets = []

    def write(source, rows):
        for part in range(2):
            path = str(source / f"train-{part:05d}-of-00002")
            with tf.io.TFRecordWriter(path) as writer:
                for image, label in rows[25 * part : 25 * part + 25]:
                    writer.write(example(image__encoded=image, image__class__label=label))

    for name, rows in (("good", good), ("bad", list(bad.values()))):
        source = tmp_path / name
        source.mkdir()
        write(source, [(image, 1) for image, _ in rows])  # labels that the index accepts
        out = str(tmp_path / f"{name}-index")
        share = 0.1  # of the images
        index.index(str(source), out, str(tmp_path / "classes.csv"), 1, share, lambda line: None)
        write(source, rows)
        records = BadRecords(0.9, skip=True, log=lambda line: None)
        data = examples.Images(f"{out}/train", SIZE, seed=1, bad_records=records)
        sets.append((data, records))
    (whole, of_good), (damaged, of_bad) = sets
    lost = {3, 5, 7, *range(16, 32)}
    kept = np.array([i not in lost for i in range(50)])
    for batches in (
        lambda data: data.evaluation_batches(7, 50),
        lambda data: data.training_batches(5).take(10),
    ):
        expected, found = joined(batches(whole)), joined(batches(damaged))
        counted = found["example_weights"] > 0
        assert counted.sum() == kept.sum()
        for key in ("image", "label"):
            np.testing.assert_array_equal(found[key][counted], expected[key][counted])
    first = joined(damaged.evaluation_batches(7, 50))["example_weights"][:50]
    np.testing.assert_array_equal(first > 0, kept)
    damaged.damage.collect()
    whole.damage.collect()
    assert (of_good.bad, of_bad.bad) == (0, len(lost))
    # Evenly spaced files: those without a label of their own are left out.
    assert len(list(damaged.files(50))) == 50 - 17
    assert {label for _, label in damaged.files(50)} == {0, 1, 2}
    (tmp_path / "bad" / "train-00001-of-00002").unlink()
    assert len(list(damaged.files(50))) == 25 - 1 - 9
    assert not joined(damaged.evaluation_batches(50, 50))["example_weights"][25:50].any()


def test_what_is_tried_for_a_crop_does_not_depend_on_the_place_in_the_batch():
    ids = tf.range(1000, 1040, dtype=tf.int64)
    whole = decoding.window_draws(seed=5, ids=ids).numpy()
    for start, end in ((0, 1), (0, 16), (3, 4), (5, 12), (39, 40)):
        part = decoding.window_draws(seed=5, ids=ids[start:end]).numpy()
        np.testing.assert_array_equal(part, whole[start:end])


def test_without_leave_a_damaged_record_ends_the_run_with_its_place(tmp_path):
    out = prepared(tmp_path) / "train"
    shard, offset = damage(out, 3)
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=f"InputError: --data_dir: {shard}, byte {offset}: damaged",
    ):
        joined(examples.Images(str(out), SIZE, seed=1).evaluation_batches(5, 100))


def test_a_label_outside_the_class_list_is_no_damage(tmp_path):
    said = []
    path = tmp_path / "source/train-00000-of-00001"
    path.parent.mkdir()

    def write(labels):
        with tf.io.TFRecordWriter(str(path)) as writer:
            for label in labels:
                image = encoded(smooth(60, 80, seed=1))
                writer.write(example(image__encoded=image, image__class__label=label))

    write([1, 2, 1])
    (tmp_path / "classes.csv").write_text("index,wnid,name\n0,n0,a\n1,n1,b\n")
    out = str(tmp_path / "out")
    index.index(str(path.parent), out, str(tmp_path / "classes.csv"), 1, log=said.append)
    said.clear()
    write([1, 7, 0])
    records = BadRecords(0.9, skip=True, log=said.append)
    data = examples.Images(f"{out}/train", SIZE, seed=1, bad_records=records)
    for batches in (data.evaluation_batches(3, 3), data.training_batches(3).take(1)):
        found = joined(batches)
        assert sorted(found["example_weights"]) == [0, 0, 1] and not found["label"].any()
    data.damage.collect()
    offsets = [offset for offset, _ in read_records(str(path))]
    messages = [
        f"{path}, byte {offsets[i]}: label {label} is outside the labels 1 to 2 of the class list. "
        "Give --label_base or --classes to `python -m inputs.images.index`."
        for i, label in ((1, 7), (2, 0))
    ]
    assert sorted(said) == sorted(f"Skipped: {message}" for message in messages)
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        joined(examples.Images(f"{out}/train", SIZE, seed=1).evaluation_batches(3, 3))
    assert message_in(caught.value) in {f"--data_dir: {message}" for message in messages}


def test_a_folder_without_readable_records_is_an_error(tmp_path):
    out = prepared(tmp_path) / "train"
    (shard,) = out.glob("*.tfrecord")
    shard.write_bytes(bytes(shard.stat().st_size))
    records = BadRecords(0.5, skip=True, log=lambda line: None)
    data = examples.Images(str(out), SIZE, seed=1, bad_records=records)
    assert list(data.files(1)) == []
    assert not joined(data.training_batches(4).take(3))["example_weights"].any()
    with pytest.raises(InputError, match="of 12 records are damaged, more than the share"):
        data.damage.collect()


def test_shards_that_cannot_be_written_are_read(tmp_path):
    folder = prepared(tmp_path) / "train"
    with read_only(folder):
        assert len(joined(make(tmp_path / "out").training_batches(4).take(3))["label"]) == 12
        assert len(stored(folder)) == 12
