"""Progress of long work: plain lines where stderr is no terminal."""

import io
import sys

import pytest

from vica.utils import progress as module
from vica.utils.progress import Lines, counter, progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(clock, seconds: float, count: int, **given) -> None:
    for _ in progress(range(count), count, "questions", **given):
        clock[0] += seconds


def test_a_line_every_tenth(clock, capsys):
    work(clock, 0.5, 200, name="POPE")
    got = capsys.readouterr()
    assert got.out == "" and "\r" not in got.err
    lines = got.err.splitlines()
    assert (
        lines[0] == "POPE: 20 of 200 questions (10%), 10 s" and lines[-1] == "POPE: 200 of 200 questions (100%), 100 s"
    )
    assert len(lines) == 10


def test_a_line_every_half_minute_of_slow_work(clock, capsys):
    work(clock, 20, 50)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["2 of 50 questions (4%), 40 s", "4 of 50 questions (8%), 80 s"] and len(lines) == 25


def test_short_work_says_nothing(clock, capsys):
    work(clock, 0.001, 1000)
    work(clock, 0.001, 0)
    assert capsys.readouterr().err == ""


def test_lines_are_seconds_apart(clock, capsys):
    work(clock, 0.3, 10)
    assert capsys.readouterr().err.splitlines() == ["7 of 10 questions (70%), 2 s", "10 of 10 questions (100%), 3 s"]


def test_work_that_goes_on_figures_and_no_total(clock, capsys):
    with counter(None, "steps", done=5) as steps:
        clock[0] += 31
        steps.set_postfix(loss="0.5")
        steps.update(3)
        steps.write("a log line")
    got = capsys.readouterr()
    assert got.err == "8 steps, 31 s, loss 0.5\n" and got.out == "a log line\n"


def test_broken_off_work_tells_no_end(clock, capsys):
    with pytest.raises(ZeroDivisionError), counter(4, "steps") as steps:
        for _ in range(3):
            clock[0] += 31
            steps.update()
        1 / 0  # noqa: B018
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_bar_on_a_terminal_and_nothing_where_it_is_not_shown(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert not isinstance(counter(3, "steps", shown=False), Lines) and sys.stderr.getvalue() == ""
    assert list(progress(range(3), 3, "steps", "train")) == [0, 1, 2]
    assert "train: 100%" in sys.stderr.getvalue() and " steps/s" in sys.stderr.getvalue()
