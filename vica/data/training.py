"""Makes training examples from records: token ids, labels and pixels, by index or as a stream.

Bad data never raises and is never replaced by something else: it comes as `Broken`, with the reason, in its place.
"""

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..utils.errors import ViCAError
from .labels import encode, read_turns
from .messages import shorten
from .processor import ViCAProcessor
from .samples import Samples, Stream
from .sources import where_from
from .tokenizer import IMAGE_MARK

_PROBE = [{"from": "human", "value": f"{IMAGE_MARK}\nWhat?"}, {"from": "gpt", "value": "That."}]


@dataclass(frozen=True)
class Example:
    id: str
    input_ids: torch.Tensor  # [T], one placeholder an image
    labels: torch.Tensor  # [T]
    pixel_values: list[torch.Tensor]  # float32 [3, H, W] for each placeholder


@dataclass(frozen=True)
class Broken:
    id: str
    reason: str
    record: str | None = None  # place of the record: in LLaVA's mixes many share an id, that of their image


@dataclass
class Preparation:
    """Turns a record into an example. `max_length` counts positions, of which an image takes `visual_tokens`."""

    processor: ViCAProcessor
    image_folder: str | os.PathLike | None = None
    template: str = "vicuna_v1"
    max_length: int | None = None
    visual_tokens: int = 1

    def __post_init__(self):
        encode(_PROBE, self.processor, self.template)  # a setting that fails for every record is no record's fault
        check_folder(self.image_folder)

    def __call__(self, record: Mapping, name: str) -> Example | Broken:
        try:
            check_record(record)
            ids, labels = encode(
                record["conversations"], self.processor, self.template, self.max_length, self.visual_tokens
            )
            # images beyond these are cut off with the end of the text
            seen = ids.count(self.processor.image_token_index)
            images = [image_source(image, self.image_folder) for image in images_of(record)[:seen]]
            pixels = [torch.from_numpy(array) for array in self.processor.process_images(images)] if images else []
        except ViCAError as error:
            return Broken(id_of(record, name), str(error), name)
        return Example(id_of(record, name), torch.tensor(ids), torch.tensor(labels), pixels)


class TrainingSet(Dataset):
    """Gives `Example` or `Broken` by index. Its options are those of `Preparation`."""

    def __init__(self, samples: Samples, processor: ViCAProcessor, image_folder=None, **options):
        self.samples, self.prepare = samples, Preparation(processor, image_folder, **options)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example | Broken:
        return self.prepare(self.samples[index], self.samples.name(index))

    @cached_property
    def lengths(self) -> list[int]:
        """Words of each sample, negative if it has no image, as LLaVA counts; never 0."""
        return [length_of(record) for record in self.samples.without_images()]


class TrainingStream(IterableDataset):
    """Yields the same items from a stream, each to one worker of one rank, shuffled within a buffer of records.

    It deals the records to the ranks itself: nothing else, such as accelerate's preparation of loaders, may do so
    again. `endless` starts the next epoch after each. Then no rank ends before another, and the number of batches so
    far alone tells how far a run is.
    """

    def __init__(
        self,
        stream: Stream,
        processor: ViCAProcessor,
        image_folder=None,
        buffer: int = 1000,
        seed: int = 0,
        endless: bool = False,
        **options,
    ):
        self.stream, self.prepare = stream, Preparation(processor, image_folder, **options)
        self.buffer, self.seed, self.endless = buffer, seed, endless
        self.epoch = torch.tensor(0).share_memory_()  # persistent workers must see changes

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Example | Broken]:
        rank, world = rank_and_world()
        worker = get_worker_info()
        place = (rank, world, worker.id, worker.num_workers) if worker else (rank, world, 0, 1)
        first = int(self.epoch)
        for epoch in count(first) if self.endless else [first]:
            dice, empty = random.Random(f"{self.seed} {epoch} {place}"), True
            for name, record in shuffled(self.stream.share(*place), self.buffer, dice):
                yield self.prepare(record, name)
                empty = False
            if empty and place[2] > 0:  # `datasets` gives a dataset of one file to the first worker only
                return
            if empty and self.endless:
                raise ViCAError("the stream has fewer records than there are processes that read it")


def shuffled(items: Iterator, size: int, dice: random.Random) -> Iterator:
    """Yields each item after a random wait in a buffer."""
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) > size:
            place = dice.randrange(len(waiting))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            yield waiting.pop()
    dice.shuffle(waiting)
    yield from waiting


def rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def check_folder(image_folder) -> None:
    if image_folder is not None and not os.path.isdir(image_folder):
        raise ViCAError(f"--image-folder is {os.fspath(image_folder)!r}: no such folder{where_from(image_folder)}")


def check_record(record: Mapping) -> None:
    """Checks all that needs neither a tokenizer nor an open image."""
    if not isinstance(record, Mapping) or "conversations" not in record:
        raise ViCAError(f"a record must be a JSON object with conversations, got {shorten(record)}")
    marks = sum(turn.count(IMAGE_MARK) for turn in read_turns(record["conversations"]))
    if marks != len(images_of(record)):
        raise ViCAError(
            f"the text has {marks} {IMAGE_MARK} marks, but the record names {len(images_of(record))} images"
        )


def images_of(record: Mapping) -> list:
    image = record.get("image")
    if image is None or image == "":
        return []
    return image if isinstance(image, list) else [image]


def image_source(image, folder):
    """Returns a source that `load_image` takes. A name is always a file: a URL in a record is not followed."""
    if isinstance(image, Mapping) and image.get("bytes") is not None:
        return image["bytes"]
    name = image.get("path") if isinstance(image, Mapping) else image
    return Path(folder or "", name) if isinstance(name, str) else image


def id_of(record, name: str) -> str:
    given = record.get("id") if isinstance(record, Mapping) else None
    return name if given is None else str(given)


def length_of(record) -> int:
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    values = [turn.get("value") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    texts = [text for text in values if isinstance(text, str)]
    words = max(1, sum(len(text.split()) for text in texts))
    return words if any(IMAGE_MARK in text for text in texts) else -words
