"""Folders that appear whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ViCAError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end; where the writing fails, nothing is left of it.
    `target` must be new or empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ViCAError(f"{target} exists and is not empty; nothing is overwritten")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as work:
        partial = Path(work) / "partial"
        partial.mkdir()
        yield partial
        try:
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        except OSError as error:
            raise ViCAError(f"{target} could not be put in place ({error.strerror}); nothing is overwritten") from error
