"""Keep features and frozen K/V of images by the hash of their content, so that any number of questions about an image
costs its tower, projector and K/V once.

An entry is an image's features, or its K/V at one start position. Entries in use stay; the others go when room is
needed, the longest unused first. A memory can be saved, and loaded again for the same weights and layers.
"""

import json
import logging
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..utils.errors import ViCAError

log = logging.getLogger(__name__)

FORMAT = "vica image memory 1"
FEATURES = -1  # in place of a start position: the entry is features, not K/V
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


Name = tuple[str, int]  # key and start of an entry
StrPath = str | os.PathLike[str]


@dataclass(eq=False)
class Entry:
    """Features or K/V of one image."""

    key: str
    start: int  # position of the first token, or FEATURES
    bytes: int
    users: int = 0
    tensor: torch.Tensor | None = None  # None until it is computed


class ImageMemory:
    """`limit` bounds the bytes of all entries, in use or kept. `keep=False`: entries go with their last user."""

    def __init__(
        self, limit: int, device: torch.device, binding: Callable[[], dict[str, Any]], keep: bool = True
    ) -> None:
        """`binding()` returns the weights, layers and preprocessing that the entries belong to."""
        self.limit, self.device, self.binding, self.keep = limit, device, binding, keep
        self.entries: OrderedDict[Name, Entry] = OrderedDict()  # least recently used first
        self.bytes = self.in_use = 0
        self.hits = self.misses = self.evictions = 0  # counted over the entries that requests needed

    def __len__(self) -> int:
        """Returns the number of images."""
        return len({key for key, _ in self.entries})

    def knows(self, key: str, start: int) -> bool:
        """Whether an image at this position needs neither pixels nor tower."""
        return (key, FEATURES) in self.entries or (key, start) in self.entries

    def find(self, key: str, start: int = FEATURES) -> Entry | None:
        """Returns the entry, which is then the most recently used."""
        if (entry := self.entries.get((key, start))) is not None:
            self.entries.move_to_end((key, start))
        return entry

    def acquire(self, key: str, start: int, size: int) -> Entry | None:
        """Returns the entry with one more user. A new one is empty, and the caller fills it. None: there is no room
        beside the entries in use."""
        entry = self.find(key, start)
        if entry is None:
            if not self._make_room(size):
                return None
            entry = self._insert(Entry(key, start, size))
        if not entry.users:
            self.in_use += entry.bytes
        entry.users += 1
        return entry

    def release(self, entry: Entry) -> None:
        """Takes one user off an entry."""
        entry.users -= 1
        if not entry.users:
            self.in_use -= entry.bytes
            if not self.keep or entry.tensor is None:
                self._remove(entry)

    def offer(self, key: str, start: int, tensor: torch.Tensor) -> None:
        """Keeps a tensor that no request uses now, if there is room."""
        size = tensor.numel() * tensor.element_size()
        if self.keep and (key, start) not in self.entries and self._make_room(size):
            self._insert(Entry(key, start, size, tensor=tensor))

    def clear(self, names: Collection[Name] | None = None) -> None:
        """Removes unused entries: those of these names, (key, start), or all."""
        for entry in [e for name, e in self.entries.items() if not e.users and (names is None or name in names)]:
            self._remove(entry)

    def _make_room(self, size: int) -> bool:
        if self.in_use + size > self.limit:
            return False
        idle = (entry for entry in list(self.entries.values()) if not entry.users)
        while self.bytes + size > self.limit:
            self._remove(next(idle))
            self.evictions += 1
        return True

    def _insert(self, entry: Entry) -> Entry:
        self.entries[entry.key, entry.start] = entry
        self.bytes += entry.bytes
        return entry

    def _remove(self, entry: Entry) -> None:
        del self.entries[entry.key, entry.start]
        self.bytes -= entry.bytes

    # --- files ---

    def save(self, path: StrPath) -> int:
        """Writes all entries as one safetensors file, tensor by tensor, and returns the number of images."""
        stored = [(entry, entry.tensor) for entry in self.entries.values() if entry.tensor is not None]
        metadata = {"format": FORMAT, "binding": json.dumps(self.binding())}
        header: dict[str, dict[str, Any]] = {"__metadata__": metadata}
        at = 0
        for entry, tensor in stored:
            place = dict(data_offsets=[at, at + entry.bytes])
            header[name_of(entry)] = dict(dtype=DTYPE_NAMES[tensor.dtype], shape=list(tensor.shape)) | place
            at += entry.bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        unfinished = Path(f"{os.fspath(path)}.unfinished")
        with open(unfinished, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, tensor in stored:
                flat = tensor.detach().contiguous().cpu().flatten()
                file.write(flat.view(torch.uint8).numpy().data)
        os.replace(unfinished, path)
        return len({entry.key for entry, _ in stored})

    def load(self, path: StrPath) -> int:
        """Adds a file's entries as far as there is room, as less recently used than those that are here already.
        Returns the number of images."""
        try:
            with safe_open(path, "pt") as file:
                self._check(file.metadata() or {}, path)
                return self._load(file, file.offset_keys(), path)
        except FileNotFoundError:
            raise ViCAError(f"image memory {os.fspath(path)!r}: no such file") from None
        except (OSError, SafetensorError) as error:
            raise ViCAError(f"image memory {os.fspath(path)!r}: cannot be read ({error})") from error

    def _load(self, file: Any, names: list[str], path: StrPath) -> int:
        loaded, left = set(), 0
        for name in reversed(names):  # the most recently used first, in case not all fit
            key, _, start = name.rpartition("@")
            tensor = file.get_tensor(name)
            size = tensor.numel() * tensor.element_size()
            if (key, int(start)) in self.entries:
                loaded.add(key)
            elif self.bytes + size <= self.limit:
                entry = self._insert(Entry(key, int(start), size, tensor=tensor.to(self.device, copy=True)))
                self.entries.move_to_end((entry.key, entry.start), last=False)
                loaded.add(key)
            else:
                left += 1
        if left:
            log.warning("%s: %d of %d entries do not fit into %d bytes", path, left, len(names), self.limit)
        return len(loaded)

    def _check(self, metadata: dict[str, str], path: StrPath) -> None:
        """Raises ViCAError where the file belongs to another model, or is no image memory."""
        try:
            theirs = dict(json.loads(metadata["binding"])) if metadata.get("format") == FORMAT else None
        except (KeyError, TypeError, ValueError):
            theirs = None
        if theirs is None:
            raise ViCAError(f"image memory {os.fspath(path)!r}: not a file that image_memory.save wrote")
        ours = json.loads(json.dumps(self.binding()))  # tuples as lists
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise ViCAError(
                    f"image memory {os.fspath(path)!r} was made with other {name} ({theirs.get(name)}) than this "
                    f"model's ({ours[name]}): its keys and values would mean nothing here"
                )


def name_of(entry: Entry) -> str:
    """Returns the entry's name in a file."""
    return f"{entry.key}@{entry.start}"
