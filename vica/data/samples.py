"""Reads raw training records in LLaVA's format by index, from JSON, JSON lines, parquet or Hugging Face datasets.

A record is a dict: "id"; "image", a path (or an embedded image), a list of them, or nothing; and "conversations", a
list of {"from": "human" or "gpt", "value": text}. Records are returned unchecked; the code that uses them checks them,
so that one bad line among millions does not stop a run. A line that is not JSON comes as its own text.
"""

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from glob import escape
from io import BytesIO
from itertools import accumulate, chain
from pathlib import Path

from ..utils.errors import ViCAError
from .sources import where_from

HUB = "hub:"


class Samples(Sequence):
    """Records by index."""

    def name(self, index: int) -> str:
        """Returns the place of a record, for messages about records without an id."""
        raise NotImplementedError

    def without_images(self) -> Iterator[dict]:
        """Yields all records in order for their text; embedded images are not read."""
        return iter(self)


class Stream:
    """Records in order, as (name, record)."""

    def __init__(self, parts: list):
        self.parts = parts

    def share(self, rank: int, world: int, worker: int, workers: int) -> Iterator[tuple[str, dict]]:
        """Yields the records for one loader process of one rank. All shares together hold every record once."""
        for part in self.parts:
            if isinstance(part, Samples):
                for index in range(rank * workers + worker, len(part), world * workers):
                    yield part.name(index), part[index]
            else:  # in a loader worker `datasets` itself gives only that worker's records
                share = _datasets().distributed.split_dataset_by_node(part, rank, world)
                for place, record in enumerate(share, 1):
                    yield f"record {place} of worker {worker} of rank {rank}", record


def open_samples(paths, streaming: bool = False) -> Samples | Stream:
    """Opens one source, or several joined, and returns its records.

    Sources are .json, .jsonl and .parquet files; folders of parquet files (only those named train* if there are any) or
    folders that `datasets` saved; and hub:NAME or hub:NAME:CONFIG for the train split of a hub dataset, the only split
    that is ever downloaded. `streaming` reads parquet and the hub in order as they come, instead of first converting
    everything to memory-mapped tables.
    """
    paths = [os.fspath(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not paths:
        raise ViCAError("no training data is named; give .json, .jsonl or .parquet files, folders or hub:NAME")
    parts = [_open(path, streaming) for path in paths]
    if streaming:
        return Stream(parts)
    return parts[0] if len(parts) == 1 else _Joined(parts)


def _open(path: str, streaming: bool):
    kind = Path(path).suffix.lower()
    if path.startswith(HUB):
        name, _, config = path.removeprefix(HUB).partition(":")
        return _open_table(path, streaming, name, config or None)
    if not os.path.exists(path):
        raise ViCAError(
            f"{path}: no such file or folder (a data set of the hub is written {HUB}NAME){where_from(path)}"
        )
    if kind == ".jsonl":
        return _Lines(path)
    if kind == ".json":
        return _Lines(path, _pack(path))
    if kind == ".parquet":
        return _open_parquet(path, streaming, [path])
    if any(Path(path, name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _open_saved(path, streaming)
    if files := sorted(Path(path).rglob("*.parquet")):
        training = [file for file in files if file.name.startswith("train")]
        return _open_parquet(path, streaming, training or files)
    raise ViCAError(f"{path} is neither .json, .jsonl, .parquet nor a folder that holds parquet or a saved data set")


class _Lines(Samples):
    """JSON records by the byte offsets of their lines, in a file or in memory.

    It is not a list of dicts: reading an object writes its reference count, so every worker would end up with a copy of
    the list.
    """

    def __init__(self, path: str, packed: bytes | None = None):
        self.path, self.packed = path, packed
        self.offsets, position = array("q"), 0
        with self._file() as lines:
            for line in lines:
                if not line.isspace():
                    self.offsets.append(position)
                position += len(line)
        if not self.offsets:
            raise ViCAError(f"{path} holds no record")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> dict:
        with self._file() as lines:
            lines.seek(self.offsets[index])
            return _parse(lines.readline())

    def name(self, index: int) -> str:
        return f"{self.path}, record {index + 1}"

    def without_images(self) -> Iterator[dict]:
        with self._file() as lines:
            yield from (_parse(line) for line in lines if not line.isspace())

    def _file(self):
        # Opened anew each time: forked workers that share an open file move each other's position in it.
        return open(self.path, "rb") if self.packed is None else BytesIO(self.packed)


class _Table(Samples):
    """A dataset of the `datasets` library."""

    def __init__(self, path: str, dataset):
        self.path, self.dataset = path, dataset
        if not len(dataset):
            raise ViCAError(f"{path} holds no record")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.dataset[index]

    def name(self, index: int) -> str:
        return f"{self.path}, record {index + 1}"

    def without_images(self) -> Iterator[dict]:
        return iter(self.dataset.select_columns("conversations"))


class _Joined(Samples):
    def __init__(self, parts: list[Samples]):
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> dict:
        part, inner = self._find(index)
        return part[inner]

    def name(self, index: int) -> str:
        part, inner = self._find(index)
        return part.name(inner)

    def without_images(self) -> Iterator[dict]:
        return chain.from_iterable(part.without_images() for part in self.parts)

    def _find(self, index: int) -> tuple[Samples, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect_right(self.ends, index)
        return self.parts[place], index - (self.ends[place - 1] if place else 0)


def _parse(line: bytes):
    try:
        return json.loads(line)
    except ValueError:
        return line.decode(errors="replace").strip()


def _pack(path: str) -> bytes:
    try:
        records = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ViCAError(f"{path} is no JSON ({error}); a file of JSON lines must be named .jsonl") from error
    if not isinstance(records, list):
        raise ViCAError(f"{path} must hold a list of records; it holds a {type(records).__name__}")
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _open_parquet(path: str, streaming: bool, files: list):
    # escaped, because `datasets` reads file names as glob patterns
    return _open_table(path, streaming, "parquet", data_files=[escape(os.path.abspath(file)) for file in files])


def _open_table(path: str, streaming: bool, *where, **options):
    return _checked(path, _loaded(path, "load_dataset", *where, split="train", streaming=streaming, **options))


def _open_saved(path: str, streaming: bool):
    dataset = _loaded(path, "load_from_disk", path)
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise ViCAError(f"{path} has no part named train, but {', '.join(dataset)}")
        dataset = dataset["train"]
    return _checked(path, dataset.to_iterable_dataset() if streaming else dataset)


def _loaded(path: str, how: str, *where, **options):
    function = getattr(_datasets(), how)
    try:
        return function(*where, **options)
    except Exception as error:  # `datasets` raises many types for a broken file, a wrong name or no network
        raise ViCAError(f"{path} cannot be opened: {' '.join(str(error).split()) or type(error).__name__}") from error


def _checked(path: str, dataset):
    """Returns the dataset with its images left as files. We decode them ourselves, so that a broken one stops
    nothing."""
    columns = dataset.features or {}
    if columns and "conversations" not in columns:
        raise ViCAError(f"{path} has no column conversations, but {', '.join(columns)}")
    undecoded = _datasets().Image(decode=False)
    if isinstance(columns.get("image"), _datasets().Image):
        dataset = dataset.cast_column("image", undecoded)
    elif isinstance(getattr(columns.get("image"), "feature", None), _datasets().Image):
        dataset = dataset.cast_column("image", _datasets().List(undecoded))
    return _Table(path, dataset) if isinstance(dataset, _datasets().Dataset) else dataset


def _datasets():
    try:
        import datasets
        import datasets.distributed
    except ImportError as error:
        raise ViCAError('parquet files and Hugging Face data sets need: pip install "vica[train]"') from error
    return datasets
