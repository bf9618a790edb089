"""Progress is a bar on a terminal and plain lines everywhere else."""

import io
import sys

import pytest

from inputs.progress import Progress, log


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(**arguments):
    with Progress(4, " shards", **arguments) as progress:
        for index in range(4):
            progress.advance(1)
            progress.note(f"{index} images")
            progress.milestone(f"shard {index}")
        log("a line")


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work()
    shown = terminal.getvalue()
    assert "4/4" in shown and "\r" in shown and "a line\n" in shown
    assert "shard 0 (" not in shown


def test_plain_lines_elsewhere(capsys):
    work()
    lines = capsys.readouterr().err
    assert lines.splitlines() == [*(f"shard {i} ({25 * i + 25}%)" for i in range(4)), "a line"]
    assert "\r" not in lines


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_nothing_if_it_is_turned_off(monkeypatch, stream):
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    work(enabled=False)
    assert shown.getvalue() == "a line\n"
