"""A folder that cannot be written, also for root."""

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Iterator

import pytest

CAP_DAC_OVERRIDE = 1  # of linux/capability.h: root may write what the mode forbids
VERSION_3 = 0x20080522


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[None]:
    """Takes the permission to write away from a folder and all that is in it.

    Root loses the right to write nevertheless, in this thread. The test is skipped if that fails.
    """
    paths = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    with _without_override():
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            if _can_write(folder):
                pytest.skip("the permission to write cannot be taken away")
            yield
        finally:
            for path, mode in zip(paths, modes, strict=True):
                path.chmod(mode)


def _can_write(folder):
    try:
        (folder / "probe").touch()
    except OSError:
        return False
    (folder / "probe").unlink()
    return True


@contextlib.contextmanager
def _without_override():
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(VERSION_3, 0)  # 0: this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    if os.geteuid() or libc.capget(header, sets):
        yield
        return
    effective = sets[0]
    sets[0] &= ~(1 << CAP_DAC_OVERRIDE)
    libc.capset(header, sets)
    try:
        yield
    finally:
        sets[0] = effective
        libc.capset(header, sets)
