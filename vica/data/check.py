"""Checks all samples before days of training depend on them."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.utils.data import DataLoader, Dataset

from ..utils.errors import ViCAError
from .images import load_image
from .labels import IGNORE, encode
from .processor import ViCAProcessor
from .samples import Samples
from .training import Broken, check_folder, check_record, id_of, image_source, images_of

_AT_ONCE = 32  # samples that a loader worker hands over at once


@dataclass(frozen=True)
class Finding:
    """Counts of one sample, or the reason why it is broken."""

    id: str
    turns: int = 0
    images: int = 0
    positions: int = 0
    learned: int = 0
    reason: str | None = None


@dataclass
class Summary:
    samples: int = 0
    with_image: int = 0
    turns: int = 0
    images: int = 0
    learned: int = 0
    lengths: list[int] = field(default_factory=list)
    ids: Counter = field(default_factory=Counter)
    broken: list[Broken] = field(default_factory=list)

    def add(self, found: Finding) -> None:
        self.samples += 1
        self.ids[found.id] += 1
        if found.reason is not None:
            self.broken.append(Broken(found.id, found.reason))
            return
        self.with_image += found.images > 0
        self.turns += found.turns
        self.images += found.images
        self.learned += found.learned
        self.lengths.append(found.positions)


class Check(Dataset):
    """Dataset with a finding for each sample. Without a processor it checks only the structure and the images."""

    def __init__(
        self,
        samples: Samples,
        image_folder: str | os.PathLike | None = None,
        processor: ViCAProcessor | None = None,
        template: str = "v1",
        visual_tokens: int = 1,
    ):
        check_folder(image_folder)
        self.samples, self.image_folder = samples, image_folder
        self.processor, self.template, self.visual_tokens = processor, template, visual_tokens

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Finding:
        record = self.samples[index]
        ids: list[int] = []
        labels: list[int] = []
        name = id_of(record, self.samples.name(index))
        try:
            check_record(record)
            if self.processor is not None:
                ids, labels = encode(record["conversations"], self.processor, self.template)
            images = [image_source(image, self.image_folder) for image in images_of(record)]
            if self.processor is None:
                for image in images:
                    load_image(image)
            elif images:
                self.processor.process_images(images)
        except ViCAError as error:
            return Finding(name, reason=str(error))
        positions = len(ids) + len(images) * (self.visual_tokens - 1)
        learned = sum(label != IGNORE for label in labels)
        return Finding(name, len(record["conversations"]), len(images), positions, learned)

    def findings(self, workers: int) -> Iterator[Finding]:
        for some in DataLoader(self, batch_size=_AT_ONCE, num_workers=workers, collate_fn=list):
            yield from some
