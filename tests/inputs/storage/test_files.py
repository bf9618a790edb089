"""Files and folders are written completely or not at all, and locks exclude other processes."""

import contextlib
import os
import pathlib
import threading

import pytest

from inputs.errors import InputError
from inputs.storage import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_only_on_success(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    (tmp_path / "a.txt.new").write_text("left by a process that was killed")
    with pytest.raises(RuntimeError, match="stopped"):
        with files.atomic_write(path) as file:
            file.write("half")
            raise RuntimeError("stopped")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with files.atomic_write(path) as file:
        file.write("é")
        assert path.read_text() == "old"
    assert path.read_bytes() == "é".encode() and names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_only_on_success(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(RuntimeError, match="stopped"):
        with files.atomic_folder(path) as new:
            (pathlib.Path(new) / "half").touch()
            raise RuntimeError("stopped")
    assert names(path) == ["old"] and names(tmp_path) == ["folder"]
    with files.atomic_folder(path) as new:
        (pathlib.Path(new) / "whole").touch()
        assert names(path) == ["old"]
    assert names(path) == ["whole"] and names(tmp_path) == ["folder"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_and_the_folder_that_it_leads_to_is_replaced(exists, tmp_path):
    (tmp_path / "disk").mkdir()
    folder = tmp_path / "disk/folder"
    if exists:
        folder.mkdir()
        (folder / "old").touch()
    link = tmp_path / "link"
    link.symlink_to(folder)
    with files.atomic_folder(str(link)) as new:
        (pathlib.Path(new) / "whole").touch()
    assert link.is_symlink() and names(folder) == ["whole"]
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["folder"]
    # As a process leaves it that is killed between the renames.
    (tmp_path / "disk/.folder.new").mkdir()
    folder.rename(tmp_path / "disk/.folder.new" / files.OLD)
    assert files.recover_folder(str(link))
    assert link.is_symlink() and names(folder) == ["whole"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_survives_a_kill_before_between_and_after_the_renames(
    renames, tmp_path, monkeypatch
):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename, done = os.replace, []

    def replace(source, target):
        if len(done) == renames:
            raise Killed
        done.append(target)
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files.os, "replace", replace)
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # as after `kill -9`
        with files.atomic_folder(path) as new:
            (pathlib.Path(new) / "whole").touch()
        raise Killed
    assert path.exists() == (renames != 1)
    assert files.recover_folder(path) == (renames == 1)
    assert names(path) == (["whole"] if renames == 2 else ["old"])
    # The next writer, without `recover_folder`, finds the same and leaves nothing behind.
    with pytest.raises(RuntimeError), files.atomic_folder(path):
        raise RuntimeError
    assert names(path) == (["whole"] if renames == 2 else ["old"])
    assert names(tmp_path) == ["folder"]


def test_a_writer_that_fails_after_a_kill_keeps_the_folder(tmp_path):
    (tmp_path / ".folder.new/old").mkdir(parents=True)
    (tmp_path / ".folder.new/old/kept").touch()
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "folder"):
        raise RuntimeError
    assert names(tmp_path / "folder") == ["kept"] and names(tmp_path) == ["folder"]


def test_a_rename_that_fails_keeps_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename = os.replace

    def replace(source, target):
        if pathlib.Path(source).name == "new":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OSError, match="No space"), files.atomic_folder(path):
        pass
    assert names(path) == ["old"] and names(tmp_path) == ["folder"]


def test_json_is_written_and_read(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [1, "é"]})
    assert files.read_json(tmp_path / "a.json") == {"a": [1, "é"]}


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[" * 100_000])
def test_unreadable_json_is_one_sentence(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"^--flag: .*a.json cannot be read as JSON .*Fix it\.$"):
        files.read_json(path, flag="--flag", fix="Fix it.")
    with pytest.raises(InputError, match=r"^/.*a.json cannot be read as JSON .*\.$"):
        files.read_json(path)


def test_a_lock_excludes_others_and_ends_with_its_block(tmp_path):
    with files.locked(tmp_path, "--output"):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()} on .*Let it end"):
            with files.locked(tmp_path, "--output"):
                pass
    with files.locked(tmp_path, "--output", wait=True, waiting=pytest.fail):
        pass
    said = []
    with contextlib.ExitStack() as first:
        first.enter_context(files.locked(tmp_path, "--output"))

        def let_it_end(holder):
            said.append(holder)
            first.close()

        with files.locked(tmp_path, "--output", wait=True, waiting=let_it_end):
            pass
    assert said[0].startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    said = []
    with files.locked(tmp_path, "--output", log=said.append):
        pass
    assert "cannot be locked (No locks available)" in said[0]


def test_the_cache_of_a_user_without_a_home_is_among_temporary_files(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.cache_folder() == "/home/me/.cache/tf_lamb"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert files.cache_folder() == f"{files.tempfile.gettempdir()}/tf_lamb-{os.getuid()}"


def test_a_temporary_folder_is_removed_or_its_absence_explained(monkeypatch):
    with files.temporary_folder("mine-") as folder:
        pathlib.Path(folder, "file").touch()
        assert "mine-" in folder
    assert not os.path.exists(folder)

    def full(**arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", full)
    with pytest.raises(InputError, match=r"made \(No space left on device\)\. Set .* TMPDIR to"):
        with files.temporary_folder("mine-"):
            pass


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    files.check_writable(tmp_path / "a/b", "--flag")
    assert names(tmp_path / "a/b") == []
    with pytest.raises(InputError, match=r"^--flag: the name '.*caf\\udce9' is not UTF-8, or"):
        files.check_writable(os.fsdecode(b"caf\xe9"), "--flag")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--flag: .*file/b cannot be written .Not a directory"):
        files.check_writable(tmp_path / "file/b", "--flag")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(
        InputError, match=r"link cannot be written \(it is a link to .*/gone, which"
    ):
        files.check_writable(str(tmp_path / "link"), "--flag")
    with pytest.raises(InputError, match="--flag: .*nowhere cannot be written: No such file"):
        with files.locked(tmp_path / "nowhere", "--flag"):
            pass


def test_sizes_are_asked_for_at_the_same_time(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{i}") for i in range(8)]
    for i, path in enumerate(paths[:-1]):
        pathlib.Path(path).write_bytes(bytes(i))
    together = threading.Barrier(4, timeout=60)  # no call ends before three others have begun
    getsize = os.path.getsize

    def wait(path):
        together.wait()
        return getsize(path)

    monkeypatch.setattr(os.path, "getsize", wait)
    assert files.file_sizes(paths) == [*range(7), None]
