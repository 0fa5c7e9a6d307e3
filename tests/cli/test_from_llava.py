"""docs/from-llava.md: each flag that it says is ours is a flag of that verb, and every flag that LLaVA's scripts share
with us is told."""

import argparse
import re
from pathlib import Path

import pytest

from vica.cli.main import build_parser
from vica.train import arguments

PAGE = (Path(__file__).parents[2] / "docs/from-llava.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## [^\n]*`vica (\w+)`\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M))


def flags_of(verb: str) -> set[str]:
    if verb == "train":
        parser = arguments.build_parser()
    else:
        verbs = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
        parser = verbs.choices[verb]
    return {flag for action in parser._actions for flag in action.option_strings}


@pytest.mark.parametrize("verb", SECTIONS)
def test_flags_are_ours(verb):
    rows = re.findall(r"^\| (.*?) \| (.*) \|$", SECTIONS[verb], re.M)[1:]
    told = {flag for _, ours in rows for flag in re.findall(r"`(--[\w-]+)", ours)}
    assert told and told <= flags_of(verb), told - flags_of(verb)


def test_all_programs_have_their_table():
    assert list(SECTIONS) == ["chat", "eval", "train", "convert"]


def test_what_has_the_same_name_is_not_told_to_be_missing():
    for verb, section in SECTIONS.items():
        for theirs, ours in re.findall(r"^\| (.*?) \| (none.*) \|$", section, re.M):
            shared = set(re.findall(r"`(--[\w-]+)", theirs)) & flags_of(verb)
            assert not shared, (verb, shared, ours)


def test_flags_in_scripts_run_as_they_stand():
    """A whole command of the table of programs: flags of `vica train`."""
    command = next(cell for cell in re.findall(r"`(bash [^`]*--[^`]*)`", PAGE))
    assert set(re.findall(r"--\w+", command)) <= flags_of("train")
