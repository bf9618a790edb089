"""Files and folders at paths with a scheme: nothing is half written, also where the storage fails.

`ram://` and `file://` are file systems of TensorFlow that are reached as a bucket is.
"""

import contextlib
import gzip
import json
import os
import pathlib
import re
import threading
import uuid

import pytest
import tensorflow as tf
from faulty_storage import Killed, faulty_storage, lease_times

from export.saved_model import SAVED_MODEL, check_export_dir, check_not_occupied
from inputs.errors import InputError
from inputs.storage import files, lease, remote


@pytest.fixture(params=["ram", "file"])
def folder(request, tmp_path):
    """A folder that no other test uses."""
    return f"ram://{uuid.uuid4().hex}" if request.param == "ram" else f"file://{tmp_path}/folder"


def contents(folder):
    """Name -> content of all objects in a folder."""
    found = {}
    for below, _, names in tf.io.gfile.walk(folder):
        for path in (f"{below}/{name}" for name in names):
            with tf.io.gfile.GFile(path, "rb") as file:
                found[path.removeprefix(f"{folder}/")] = file.read().decode()
    return found


def test_files_are_written_read_listed_and_deleted(folder):
    files.check_writable(f"{folder}/a/b", "--flag")
    assert files.is_folder(f"{folder}/a/b") and files.list_names(f"{folder}/a/b") == []
    with files.atomic_write(f"{folder}/a/b/text") as file:
        file.write("é\n")
        assert not files.exists(f"{folder}/a/b/text")
    assert files.read_bytes(f"{folder}/a/b/text") == "é\n".encode()
    files.write_json(f"{folder}/a/bottom", 2)  # whose name begins with that of a folder
    assert files.list_names(f"{folder}/a/b") == ["text"]
    files.remove(f"{folder}/a/bottom")
    files.write_json(f"{folder}/a/.hidden", [1])
    assert files.read_json(f"{folder}/a/.hidden") == [1]
    with files.atomic_file(f"{folder}/a/empty") as new:
        pathlib.Path(new).touch()
    assert files.file_size(f"{folder}/a/empty") == 0 and files.is_file(f"{folder}/a/empty")
    assert not files.is_file(f"{folder}/a/b") and not files.exists(f"{folder}/c")
    assert files.is_folder(folder) and files.exists(folder)
    assert not files.is_folder(f"{folder}/a/em") and not files.exists(f"{folder}/a/em")
    passed_over = files.PassedOver()
    assert [entry.path for entry in files.walk(folder, "--flag", passed_over)] == [
        f"{folder}/a/empty",
        f"{folder}/a/b/text",
    ]
    assert passed_over == {"hidden": 1}
    files.remove(f"{folder}/a/empty")
    files.remove(f"{folder}/a/empty")
    assert files.list_names(f"{folder}/a") == [".hidden", "b"]
    files.remove_folder(f"{folder}/a")
    assert not files.exists(f"{folder}/a/b/text")
    files.remove_folder(f"{folder}/a")
    with pytest.raises(FileNotFoundError):
        files.list_names(f"{folder}/a")
    with pytest.raises(FileNotFoundError):
        files.open_bytes(f"{folder}/a/b/text")
    with pytest.raises(InputError, match=r"^--flag: .*/a cannot be read \(No such file"):
        list(files.walk(f"{folder}/a", "--flag"))


def test_a_block_that_fails_writes_nothing(folder):
    files.make_folder(folder)
    for write in (files.atomic_write, files.atomic_file, files.atomic_folder):
        with pytest.raises(RuntimeError), write(f"{folder}/a"):
            raise RuntimeError
    assert files.list_names(folder) == []


def test_python_readers_read_objects(folder):
    lines = [f"line {i}\n".encode() for i in range(100_000)]
    files.make_folder(folder)
    with files.atomic_write(f"{folder}/a.gz", "wb") as file:
        file.write(gzip.compress(b"".join(lines)))
    with files.open_bytes(f"{folder}/a.gz") as raw, gzip.open(raw) as file:
        assert list(file) == lines
        assert raw.tell() == files.file_size(f"{folder}/a.gz")
        raw.seek(-8, os.SEEK_END)
        assert int.from_bytes(raw.read()[4:], "little") == sum(map(len, lines))


def kill_everywhere(monkeypatch, prepare, act, check):
    """Kills `act` in each of its operations in turn, and calls `check` after each of them."""
    for operation in range(1, 200):
        place = prepare()
        with faulty_storage(monkeypatch, seed=operation) as storage:
            storage.kill_at(operation)
            try:
                act(place)
                return operation
            except Killed:
                storage.restart()
                check(place)
    raise AssertionError("it never ends")


def test_a_file_has_the_old_or_the_new_content_at_every_kill(monkeypatch):
    def prepare():
        path = f"ram://{uuid.uuid4().hex}/a"
        files.write_json(path, {"old": 1})
        return path

    found = []

    def check(path):
        found.append(files.read_json(path))
        assert found[-1] in ({"old": 1}, {"new": [2] * 9})
        files.write_json(path, {"newer": 3})
        assert files.read_json(path) == {"newer": 3}
        assert json.loads(tf.io.gfile.GFile(path, "rb").read()) == {"newer": 3}

    operations = kill_everywhere(
        monkeypatch, prepare, lambda path: files.write_json(path, {"new": [2] * 9}), check
    )
    assert operations > 4
    assert {"old": 1} in found and {"new": [2] * 9} in found


OLD = {"pb": "old", "variables/a": "old a", "variables/b": "old b", "gone/c": "old c"}
FRESH = {"pb": "newer", "variables/a": "newer a", "other/d": "newer d"}


def write_folder(path, new):
    with files.atomic_folder(path, last="pb") as fresh:
        for name, content in new.items():
            pathlib.Path(fresh, name).parent.mkdir(exist_ok=True)
            pathlib.Path(fresh, name).write_text(content)


def test_a_folder_is_replaced(folder):
    write_folder(f"{folder}/a", OLD)
    assert contents(folder) == {f"a/{name}": content for name, content in OLD.items()}
    write_folder(f"{folder}/a", FRESH)
    assert contents(folder) == {f"a/{name}": content for name, content in FRESH.items()}
    assert not files.recover_folder(f"{folder}/a", last="pb")


def test_a_folder_is_the_old_or_the_new_one_after_a_kill_and_a_recovery(monkeypatch):
    def prepare():
        path = f"ram://{uuid.uuid4().hex}/a"
        write_folder(path, OLD)
        return path

    ends = []

    def check(path):
        # Before the recovery: if its last file is there, perhaps by half, then all others are.
        now = contents(path)
        if "pb" in now:
            kind = OLD if now["pb"] == "old" else FRESH
            assert {name: now[name] for name in kind} == kind | {"pb": now["pb"]}
        files.recover_folder(path, last="pb")
        ends.append(contents(path))
        # What a stale listing did not show may remain beside the new files.
        ends[-1] = {n: text for n, text in ends[-1].items() if n not in ("gone/c", "variables/b")}
        assert ends[-1] in (FRESH, {"pb": "old", "variables/a": "old a"})

    operations = kill_everywhere(monkeypatch, prepare, lambda p: write_folder(p, FRESH), check)
    assert operations > 20
    assert FRESH in ends and FRESH != ends[0]


def interrupted_move(monkeypatch, path, last):
    """Replaces OLD by FRESH up to the first file that would be moved."""

    def killed(source, target):
        raise Killed

    old, fresh = (
        {name.replace("pb", last): text for name, text in n.items()} for n in (OLD, FRESH)
    )
    for files_of in (old, fresh):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            if files_of is fresh:
                patch.setattr(remote, "move", killed)
            with files.atomic_folder(path, last=last) as new:
                for name, content in files_of.items():
                    pathlib.Path(new, name).parent.mkdir(exist_ok=True)
                    pathlib.Path(new, name).write_text(content)
    return fresh


def test_an_export_whose_move_was_interrupted_is_no_other_folder(monkeypatch, ram):
    fresh = interrupted_move(monkeypatch, f"{ram}/export", SAVED_MODEL)
    with pytest.raises(InputError, match="exists and is not a SavedModel"):
        check_not_occupied(f"{ram}/export")
    check_export_dir(f"{ram}/export", f"{ram}/run")
    assert files.recover_folder(f"{ram}/export", last=SAVED_MODEL)
    check_not_occupied(f"{ram}/export")
    assert contents(f"{ram}/export") == fresh
    remote.remove(f"{ram}/export/{SAVED_MODEL}")
    with pytest.raises(InputError, match="exists and is not a SavedModel"):
        check_export_dir(f"{ram}/export", f"{ram}/run")


def test_a_move_whose_files_were_deleted_is_given_up(monkeypatch, ram):
    interrupted_move(monkeypatch, f"{ram}/a", "pb")
    files.remove(f"{ram}/.a.new/other/d")
    said = []
    assert not files.recover_folder(f"{ram}/a", last="pb", log=said.append)
    assert said == [
        f"{ram}/a: its replacement was interrupted and cannot be completed, because other/d was "
        "deleted since then"
    ]
    assert not files.is_folder(f"{ram}/.a.new") and "a/variables/b" in contents(ram)
    write_folder(f"{ram}/a", FRESH)
    assert contents(f"{ram}/a") == FRESH


def test_the_copy_of_a_list_of_files_is_removed_where_listings_are_old(monkeypatch, ram):
    monkeypatch.setattr(remote, "remove_tree", lambda path: None)  # it lists the folder
    for content in (b"half", b""):
        remote.upload(f"{ram}/.a.new/{remote.PLAN}{remote.JOURNAL}", content)
        assert not files.recover_folder(f"{ram}/a", last="pb")
        assert not tf.io.gfile.exists(f"{ram}/.a.new/{remote.PLAN}{remote.JOURNAL}")
    remote.upload(f"{ram}/.a.new/{remote.PLAN}", b"{}")
    remote.upload(f"{ram}/.a.new/{remote.PLAN}{remote.JOURNAL}", b"half")
    assert files.recover_folder(f"{ram}/a", last="pb")
    assert not tf.io.gfile.exists(f"{ram}/.a.new/{remote.PLAN}{remote.JOURNAL}")


def test_an_upload_that_fails_is_an_error_of_the_storage(ram, monkeypatch):
    with faulty_storage(monkeypatch, failing=1.0):
        with pytest.raises(OSError, match="the storage does not answer"):
            files.write_json(f"{ram}/a", 1)
    assert not files.exists(f"{ram}/a")


def test_an_upload_that_is_cut_off_in_silence_is_noticed(ram, monkeypatch):
    class Cut(type(tf.io.gfile.GFile("x", "w"))):
        def write(self, data):
            super().write(data[:-1])

    monkeypatch.setattr(tf.io.gfile, "GFile", Cut)
    with pytest.raises(OSError, match="2 of 3 bytes were written"):
        remote.upload(f"{ram}/a", b"abc")


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(InputError) as error:
        files.check_writable("foo://bucket/run", "--model_dir")
    assert str(error.value).startswith(
        "--model_dir: foo://bucket/run cannot be written (this TensorFlow has no file system for "
        "foo://, only for file://, gs://, ram://"
    )
    with pytest.raises(InputError, match=r"^--model_dir: gs:/bucket/run has one slash .* gs://buc"):
        files.check_writable("gs:/bucket/run", "--model_dir")
    assert not pathlib.Path("gs:").exists() and not pathlib.Path("foo:").exists()
    with pytest.raises(InputError, match=r"^--data_dir: foo://a cannot be read \(this TensorFlow"):
        files.read_bytes("foo://a", flag="--data_dir")


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.PermissionDeniedError(None, None, "Error executing an HTTP request: code 403"),
        tf.errors.UnauthenticatedError(None, None, "no token"),
        tf.errors.FailedPreconditionError(None, None, "HTTP response code 401 with body ''\n x"),
    ],
)
def test_missing_credentials_are_explained(error, monkeypatch):
    def makedirs(path):
        raise error

    monkeypatch.setattr(remote, "gfile", lambda: type("Storage", (), {"makedirs": makedirs}))
    with pytest.raises(InputError) as raised:
        files.check_writable("gs://bucket/run", "--model_dir")
    assert "no access" in str(raised.value) and "\n" not in str(raised.value)
    assert "run `gcloud auth application-default login`" in str(raised.value)


@pytest.fixture
def quick(monkeypatch):
    """Short times for leases."""
    lease_times(monkeypatch, heartbeat=0.05, stale=0.5, settle=0.02)


def test_a_lease_excludes_others_while_it_is_renewed(folder, quick):
    files.make_folder(folder)
    said = []
    with files.locked(folder, "--model_dir") as check:
        check()
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on .*Let it end"):
            with files.locked(folder, "--model_dir", log=said.append):
                pass
        check()
    assert len(said) == 1 and "Waiting, for at most 0.5 s, whether it is still renewed" in said[0]
    assert not files.exists(f"{folder}/.lock")
    with files.locked(folder, "--model_dir", log=pytest.fail):
        pass


def test_a_process_waits_for_a_lease_if_it_is_asked_to(ram, quick):
    begun, ended = threading.Event(), []

    def hold():
        with files.locked(ram, "--output"):
            begun.set()
            threading.Event().wait(0.8)  # longer than until a lease is stale
            ended.append(True)

    files.make_folder(ram)
    thread = threading.Thread(target=hold)
    thread.start()
    begun.wait()
    with files.locked(ram, "--output", wait=True, log=lambda line: None):
        assert ended
    thread.join()


@pytest.mark.parametrize("wait", [False, True])
def test_a_process_that_comes_second_waits_if_it_is_asked_to(wait, ram, quick, monkeypatch):
    """Both found the folder free, and the other one wrote its lease last."""
    original, writes = lease.Lease._write, []

    def write(self):
        original(self)
        writes.append(self)
        if len(writes) == 1:
            write_lease(ram, host="b", boot="another")

    monkeypatch.setattr(lease.Lease, "_write", write)
    files.make_folder(ram)
    refused = contextlib.nullcontext() if wait else pytest.raises(InputError, match="in use by")
    with refused, files.locked(ram, "--output", wait=wait, log=lambda line: None) as check:
        check()
    assert len(writes) >= 1 + wait
    assert files.exists(f"{ram}/.lock") != wait  # that of another process is not removed


def test_an_object_of_another_size_is_the_lease_of_another_process(ram, quick, monkeypatch):
    original = remote.upload

    def upload(path, data):
        original(path, b'{"pid": 7, "host": "b"}')
        raise OSError(5, "23 of 186 bytes were written", path)

    files.make_folder(ram)
    monkeypatch.setattr(remote, "upload", upload)
    with pytest.raises(InputError, match="in use by process 7 on b"):
        with files.locked(ram, "--output"):
            raise AssertionError


def test_a_lease_whose_taking_was_interrupted_is_released(ram, quick, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    files.make_folder(ram)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lease.time, "sleep", interrupted)
        with files.locked(ram, "--output"):
            raise AssertionError
    assert not files.exists(f"{ram}/.lock")
    with faulty_storage(monkeypatch, failing=1.0):
        with pytest.raises(InputError, match="cannot be written: the storage does not answer"):
            with files.locked(ram, "--output"):
                raise AssertionError
    assert not files.exists(f"{ram}/.lock")


def test_a_lock_that_was_copied_from_a_disk_is_no_lease(ram, tmp_path, quick):
    with files.locked(str(tmp_path), "--model_dir"):
        remote.upload(f"{ram}/.lock", (tmp_path / ".lock").read_bytes())
    with files.locked(ram, "--model_dir", log=pytest.fail) as check:
        check()


def test_a_lease_that_was_deleted_is_told(ram, quick):
    files.make_folder(ram)
    with files.locked(ram, "--model_dir") as check:
        threading.Event().wait(0.1)
        remote.remove(f"{ram}/.lock")
        # A renewal that had begun may write it once more.
        threading.Event().wait(0.1)
        remote.remove(f"{ram}/.lock")
        with pytest.raises(lease.LeaseLost, match=r"/\.lock was deleted during the run, so"):
            check()


def write_lease(folder, **facts):
    facts = lease._this_process() | {"owner": "other", "time": 2**40} | facts
    files.make_folder(folder)
    remote.upload(f"{folder}/.lock", json.dumps(facts).encode())


@pytest.mark.parametrize(
    ("facts", "at_once"),
    [
        ({}, False),
        ({"host": "elsewhere", "boot": "another"}, False),
        ({"start": "1"}, True),  # another process had this number
        ({"pid": 2**22 + 1}, True),  # more than Linux gives
        ({"boot": "another", "time": 1.0}, True),
    ],
)
def test_a_stale_lease_is_taken_over(facts, at_once, ram, quick):
    write_lease(ram, **facts)
    said = []
    with files.locked(ram, "--model_dir", log=said.append) as check:
        check()
    assert bool(said) != at_once


def test_a_lease_that_was_written_by_half_is_taken_over(ram, quick):
    files.make_folder(ram)
    remote.upload(f"{ram}/.lock", b'{"owner": "ab')
    with files.locked(ram, "--model_dir", log=lambda line: None) as check:
        check()


def test_a_process_whose_lease_was_taken_over_must_not_write(ram, quick):
    files.make_folder(ram)
    with files.locked(ram, "--model_dir") as check:
        write_lease(ram, pid=7, host="b")
        with pytest.raises(lease.LeaseLost, match=r"was taken over by process 7 on b, because"):
            check()
    assert files.read_json(f"{ram}/.lock")["pid"] == 7  # and it is not removed


def test_two_processes_that_start_together_exclude_each_other(ram, quick):
    files.make_folder(ram)
    holds = []

    def run():
        try:
            with files.locked(ram, "--model_dir", log=lambda line: None):
                holds.append(True)
                threading.Event().wait(0.3)
        except InputError as error:
            assert re.search(r"is in use by (process \d+ on |another process\.)", str(error))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holds) <= 1


def test_a_renewal_that_fails_by_half_loses_no_lease(ram, quick, monkeypatch):
    files.make_folder(ram)
    with files.locked(ram, "--model_dir") as check:
        with faulty_storage(monkeypatch, failing=1.0) as storage:
            while not storage.writes:
                threading.Event().wait(0.01)
            check()
        threading.Event().wait(0.2)
        check()
        assert json.loads(remote.read(f"{ram}/.lock"))["pid"] == os.getpid()
