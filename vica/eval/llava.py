"""The texts that LLaVA-1.5's evaluation adds to questions, and a reader for its question files."""

from collections.abc import Iterator
from pathlib import Path

from ..utils.errors import ViCAError
from .data import read_lines

# Checkpoints were trained on these words: a changed letter costs accuracy.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


def eval_zip(folder: Path) -> str:
    """Returns the commands that get a benchmark's questions into its folder, which is one of those in the archive."""
    unpack = f"gdown 1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy && unzip eval.zip -d {folder.parent}"
    return f"It is in LLaVA's eval.zip, unpacked into {folder.parent}: {unpack}"


def records(path: Path, get: str, *names: str) -> Iterator[tuple]:
    """Yields these fields of each line of a file of JSON lines."""
    for line in read_lines(path, get):
        try:
            yield tuple(line[name] for name in names)
        except (KeyError, TypeError) as error:
            raise ViCAError(f"{path} has a line without {', '.join(names)}: {str(line)[:80]}") from error
