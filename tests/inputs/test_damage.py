"""Reports of damaged records: several workers, starts of a run, and object storage."""

import dataclasses

import pytest
import tensorflow as tf

import recipes
import train
from inputs.bad_records import MAX_NAMED, BadRecords
from inputs.damage import FOLDER, Damage, Reports
from inputs.errors import InputError
from training import strategy

RECIPE = dataclasses.replace(recipes.find_recipe("bert-mini-demo"), max_bad_record_share=0.5)


@pytest.fixture
def worker(ram):
    """A function that returns the lines and the `Damage` of a worker, by its number."""

    def make(number, examples=10):
        said = []
        reports = Reports(said.append, f"{ram}/start", f"worker {number}: ", chief=number == 0)
        return said, Damage(reports.bad_records(RECIPE), examples, reports.folder_of("train"))

    return make


def report(damage, offset, example, lost=1):
    damage.report(*(tf.constant(x) for x in ("a.tfrecord", offset, example, lost)))


def test_workers_name_what_they_find_and_share_the_limit(worker):
    (chiefs, chief), (others, other), (thirds, third) = map(worker, range(3))
    report(other, 100, 7, lost=3)
    report(chief, 200, 0)
    for damage in (chief, other, third):
        damage.collect()
    of_other = "worker 1: Skipped: a.tfrecord, byte 100: damaged or missing."
    of_chief = "worker 0: Skipped: a.tfrecord, byte 200: damaged or missing."
    assert sorted(chiefs) == [of_chief, of_other] and others == [of_other] and not thirds
    for damage in (chief, other, third):
        damage.end()
    assert chiefs[2:] == ["4 of 10 records were damaged and skipped"] and len(others) == 1
    report(chief, 300, 2)
    report(other, 100, 7, lost=3)  # in the next epoch
    other.collect()
    report(chief, 300, 3)
    with pytest.raises(InputError, match="worker .: a.tfrecord, .* 6 of 10 records are damaged"):
        third.collect()


def test_a_start_does_not_count_the_reports_of_an_earlier_one(ram, monkeypatch, two_cpus):
    monkeypatch.setattr(strategy, "drives_other_hosts", lambda where: True)
    where = tf.distribute.OneDeviceStrategy("/cpu:0")

    def start():
        reports = train.damage_reports(where, ram)
        assert reports.folder.startswith(f"{ram}/{FOLDER}/")
        return Damage(reports.bad_records(RECIPE), 10, reports.folder_of("train"))

    before = start()
    report(before, 0, 0, lost=6)
    with pytest.raises(InputError, match="6 of 10 records are damaged"):
        before.collect()
    after = start()
    after.collect()
    report(before, 0, 1, lost=6)  # of a process of the earlier start that has not ended yet
    after.end()


def test_each_place_is_named_once_and_places_are_limited(worker):
    said, damage = worker(0, examples=1_000)
    for example in range(30):  # of one page
        report(damage, 0, example)
    damage.collect()
    assert said == ["worker 0: Skipped: a.tfrecord, byte 0: damaged or missing."]
    for offset in range(1, 30):
        report(damage, offset, 0)
    damage.end()
    assert len(set(said)) == len(said) == MAX_NAMED + 1
    assert said[-1] == "59 of 1,000 records were damaged and skipped"


def test_a_report_that_is_being_written_is_read_later(tmp_path):
    said = []
    damage = Damage(BadRecords(0.5, skip=True, log=said.append), 10, str(tmp_path))
    report(damage, 0, 0)
    (path,) = tmp_path.iterdir()
    content = path.read_text()
    path.write_text(content[:-1])
    damage.collect()
    assert not said
    path.write_text(content)
    damage.end()
    assert len(said) == 2
