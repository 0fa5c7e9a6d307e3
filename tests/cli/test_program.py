"""Tests how every program ends: one line for a user's mistake, a traceback for a fault of ours."""

import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from vica.utils.errors import ViCAError
from vica.utils.program import exit_status, quiet_transformers, start_logging


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ViCAError("T2V layer 40\nis beyond  the model's 32"), 1, "vica ask: T2V layer 40 is beyond the model's 32\n"),
        (FileNotFoundError(2, "No such file", "a.png"), 1, "vica ask: [Errno 2] No such file: 'a.png'\n"),
        (torch.OutOfMemoryError("tried 3 TiB\nof 1"), 1, "vica ask: out of memory: tried 3 TiB\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_one_line(error, status, said, capsys):
    def work():
        raise error

    assert exit_status("vica ask", work) == status
    assert capsys.readouterr() == ("", said)


def test_an_interrupt_is_reported(capsys):
    def work():
        raise KeyboardInterrupt

    assert exit_status("vica train", work, "goes on later") == 130
    assert capsys.readouterr().err == "vica train: goes on later\n"


def test_a_fault_of_ours_is_a_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status("vica ask", lambda: 1 // 0)


def test_status_of_the_work():
    assert exit_status("vica train", lambda: 3) == 3 and exit_status("vica train", lambda: None) == 0


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_log_levels(level, monkeypatch):
    """Nothing is set up by default: Python prints warnings as they are, and transformers tells errors alone."""
    ours, before, set_up = logging.getLogger("vica"), transformers_logging.get_verbosity(), []
    monkeypatch.setattr(ours, "level", logging.NOTSET)
    monkeypatch.setattr(logging, "basicConfig", lambda **given: set_up.append(given))
    start_logging(level)
    quiet_transformers()
    theirs = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(before)
    assert ours.level == (logging.NOTSET if level == "warning" else getattr(logging, level.upper()))
    assert theirs == (logging.ERROR if level in ("warning", "error") else ours.level)
    assert len(set_up) == (level != "warning")
