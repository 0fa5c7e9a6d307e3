"""Reads benchmark data: files in LLaVA's folders, or datasets of the hub, which are downloaded once and kept."""

import json
import re
from collections.abc import Iterator
from functools import partial
from hashlib import sha1
from pathlib import Path

from ..utils.errors import ViCAError
from .task import StoredImage

MOVED = re.compile("^lmms-lab/")  # in 2026, to lmms-lab-encoder; earlier downloads are cached under the old name


def need(path: Path, get: str) -> Path:
    """Returns `path`, which must exist; `get` tells the user how to get it."""
    if not path.exists():
        raise ViCAError(f"{path} is not there. {get}")
    return path


def read_json(path: Path, get: str):
    content = need(path, get).read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise ViCAError(f"{path} is no JSON: {error}") from error


def read_lines(path: Path, get: str) -> Iterator[dict]:
    """Yields the records of a file of JSON lines."""
    with open(need(path, get), "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ViCAError(f"{path}, line {number} is no JSON: {error}") from error


def hub_rows(repository: str, split: str, config: str | None = None, image: str = "image"):
    """Returns a dataset of the hub, from the cache if it is there (with HF_HUB_OFFLINE=1 from the cache only), with its
    images left as they are stored."""
    try:
        import datasets
    except ImportError as error:
        raise ViCAError("reading the hub's datasets needs more packages: pip install 'vica[eval]'") from error
    failures = []
    for name in (repository, MOVED.sub("lmms-lab-encoder/", repository)):
        try:
            rows = datasets.load_dataset(name, config, split=split)
            break
        except Exception as error:  # of many types: the library's own and the network's
            failures.append((str(error).strip() or type(error).__name__).splitlines()[0])
    else:
        raise ViCAError(
            f"the hub's {repository} cannot be read: {failures[0]}; nor under its newer name: {failures[1]}"
        )
    if image not in rows.column_names:
        return rows
    stored = datasets.Image(decode=False)
    single = isinstance(rows.features[image], datasets.Image)
    return rows.cast_column(image, stored if single else datasets.List(stored))


def stored_image(rows, row: int, key: str, column: str = "image") -> StoredImage:
    return StoredImage(key, partial(_read_image, rows, row, column))


def _read_image(rows, row: int, column: str) -> bytes:
    stored = rows[row][column]
    if isinstance(stored, list):  # SEED-Bench stores the frames of a video, or one image
        stored = stored[0]
    return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def stored_images(rows, column: str = "image") -> list[StoredImage | None]:
    """Returns the images of a dataset that does not name them: rows with the same bytes share a key. None if a row has
    none."""
    return [
        stored and stored_image(rows, row, _picture_name(stored), column) for row, stored in enumerate(rows[column])
    ]


def _picture_name(stored: dict) -> str:
    return stored["path"] if stored["bytes"] is None else sha1(stored["bytes"]).hexdigest()
