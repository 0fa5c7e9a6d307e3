"""Tables read from JSON files; folders that appear whole or not at all, and that one run at a time writes."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from warnings import warn

from safetensors import SafetensorError

from .errors import ViCAError

NO_ROOM = 2**20  # bytes: a disk with less left is full

_held: set[int] = set()  # handles whose locks end with this process
os.register_at_fork(after_in_child=lambda: [os.close(handle) for handle in _held])  # a worker outlives a killed run


def one_name(path_or_repo: str | os.PathLike) -> str:
    """However a folder was spelt; a repository of the hub as it is."""
    return os.path.abspath(path_or_repo) if os.path.isdir(path_or_repo) else str(path_or_repo)


def read_json(path: Path) -> dict:
    """Returns the table that a JSON file holds."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ViCAError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError) as error:
        raise ViCAError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ViCAError(f"{path} holds a {type(content).__name__}, not a table of settings")
    return content


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` at the end; where the writing fails, nothing is left of it.
    `target` must be new or empty."""
    target = target.resolve()  # a link's folder, and a name for "."
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ViCAError(f"{target} exists and is not empty; nothing is overwritten")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.absolute().parent) as work:
        partial = Path(work) / "partial"
        partial.mkdir()
        with room_needed(partial):
            yield partial
        try:
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        except OSError as error:
            raise ViCAError(f"{target} could not be put in place ({error.strerror}); nothing is overwritten") from error


@contextmanager
def held(folder: Path, mend: str) -> Iterator[None]:
    """Keeps another run out, which would write or clear away the same files. A killed run holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    _held.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ViCAError(f"{folder} is being written by another run; {mend}") from error
        except OSError as error:
            warn(f"{folder} cannot be held against other runs: {error.strerror}", stacklevel=3)  # some network folders
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


@contextmanager
def room_needed(folder: Path) -> Iterator[None]:
    """A full disk is told as one, whatever the libraries that write there make of it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if shutil.disk_usage(there).free < NO_ROOM:
            raise ViCAError(f"{folder} could not be written: the disk is full") from error
        raise
