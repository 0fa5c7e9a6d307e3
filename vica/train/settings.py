"""A file of training's settings, which stands for flags: `vica train settings.yaml --learning_rate 1e-5`."""

import argparse
import copy
import difflib
import json
import re
from pathlib import Path

from ..utils.errors import ViCAError

KINDS = (".yaml", ".yml", ".json")


def with_file(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Returns the flags of a file that comes first in `argv`, and behind them, where they win, those that follow. What
    a launcher puts in front, such as --local_rank=0, may come before it."""
    first = next((place for place, word in enumerate(argv) if not re.match(r"--\w+=", word)), len(argv))
    if argv[first : first + 1] in ([], [""]) or argv[first].startswith("-"):
        return argv
    file = Path(argv[first])
    return [*argv[:first], *as_flags(parser, file, read(file)), *argv[first + 1 :]]


def read(file: Path) -> dict:
    if file.suffix not in KINDS:
        raise ViCAError(f"{file} is no file of settings: it must end in {', '.join(KINDS)}")
    import yaml  # comes with transformers

    try:
        text = file.read_text(encoding="utf-8")
        settings = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise ViCAError(f"{file}: no such file") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ViCAError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ViCAError(f"{file} holds a {type(settings).__name__}, not a table of settings")
    return settings


def as_flags(parser: argparse.ArgumentParser, file: Path, settings: dict) -> list[str]:
    """Returns the settings as a command line, each checked by the parser itself. None where that is the default says
    nothing."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    checker, flags = copy.copy(parser), []

    def refuse(message: str):
        raise ViCAError(f"{file}: {message}")

    checker.error = refuse  # argparse's prints the usage and exits
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            refuse(f"{key!r} is no flag of vica train" + (f"; is {near[0]} meant?" if near else ""))
        if value is None and (default := parser.get_default(name)) is not None:
            refuse(f"{key} is null, which no flag can say; its default is {default}")
        if value is None:
            continue
        several = isinstance(value, list) and actions[name].nargs == "+"
        words = [f"--{name}", *map(as_word, value)] if several else [f"--{name}={as_word(value)}"]
        checker.parse_known_args(words)
        flags += words
    return flags


def as_word(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
